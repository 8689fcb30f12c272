//! The steps of an installation: files that are written or removed. They are shown as differences first.

use std::{fmt, path::PathBuf};

use serde::Serialize;
use similar::TextDiff;

use super::root::Root;
use crate::error::Result;

/// A file that is written, or removed.
#[derive(Serialize, Clone, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) path: PathBuf,
    #[serde(skip)]
    pub(super) now: Option<String>,
    #[serde(rename = "content")]
    pub(super) wanted: Option<String>,
}

/// What was done, or would be done.
#[derive(Serialize, Default)]
pub(super) struct Report {
    /// Whether this only tells.
    pub(super) dry_run: bool,
    /// Where the program was copied to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) program: Option<PathBuf>,
    pub(super) files: Vec<Step>,
    /// What else was done, or is to be done.
    pub(super) notes: Vec<String>,
}

impl Step {
    pub(super) fn is_change(&self) -> bool {
        self.now != self.wanted
    }

    pub(super) fn run(&self, root: &Root) -> Result<()> {
        match &self.wanted {
            Some(text) => root.write(&self.path, text.as_bytes(), 0o644),
            None => root.remove(&self.path),
        }
    }

    /// The step that takes this one back.
    pub(super) fn back(&self) -> Self {
        Self {
            path: self.path.clone(),
            now: self.wanted.clone(),
            wanted: self.now.clone(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = Vec::new();
        if let Some(program) = &self.program {
            lines.push(format!("program: {}", program.display()));
        }
        for step in &self.files {
            let path = step.path.display().to_string();
            let named =
                |text: &Option<String>| text.as_ref().map_or("/dev/null".into(), |_| path.clone());
            let texts = [&step.now, &step.wanted].map(|text| text.as_deref().unwrap_or_default());
            let difference = TextDiff::from_lines(texts[0], texts[1]);
            let shown = difference
                .unified_diff()
                .header(&named(&step.now), &named(&step.wanted))
                .to_string();
            lines.push(shown.trim_end().to_owned());
        }
        if self.files.is_empty() && self.program.is_none() {
            lines.push("nothing to change".to_owned());
        }
        lines.extend(self.notes.iter().cloned());
        f.write_str(&lines.join("\n"))
    }
}
