//! The page of `socinbd report`: one HTML file without scripts and without anything from elsewhere.
//!
//! Names come from images. Each text is escaped, and the page's policy forbids scripts and requests in any case.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt::{self, Write as _},
};

use super::summary::{FileSummary, Summary};
use crate::{
    cli::output,
    engine::{FetchReport, FileFetch, LayerFetches},
    layer::FetchReason,
};

const STYLE: &str = include_str!("report.css");
/// Columns of numbers.
const NUMBERS: [&str; 9] = [
    "First wait",
    "Waits",
    "Waited",
    "Fetched",
    "Beginning",
    "Duration",
    "Spans",
    "Size",
    "Requests",
];
/// Characters of a path, at most.
const NAME: usize = 400;
/// Rows of a table, at most; a line says how many more there are.
const FILES: usize = 300;
const FETCHES: usize = 2000;

/// The page of a report.
pub(super) fn page(report: &FetchReport) -> String {
    let mut html = String::new();
    // writing to a String cannot fail
    let _ = Page {
        report,
        summary: Summary::of(report),
    }
    .write(&mut html);
    html
}

struct Page<'a> {
    report: &'a FetchReport,
    summary: Summary<'a>,
}

impl Page<'_> {
    fn write(&self, html: &mut String) -> fmt::Result {
        let image = escape(&self.report.reference.to_string());
        write!(
            html,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <title>Start of {image}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
             <header>\n<h1>Start of <code>{image}</code></h1>\n"
        )?;
        self.facts(html)?;
        html.push_str(
            "<nav aria-label=\"Sections\"><ul>\n\
             <li><a href=\"#timeline\">Files that were waited for</a></li>\n\
             <li><a href=\"#fetches\">Fetches</a></li>\n\
             <li><a href=\"#layers\">Layers</a></li>\n\
             <li><a href=\"#unread\">Files that no start has read</a></li>\n\
             </ul></nav>\n</header>\n<main>\n",
        );
        self.timeline(html)?;
        self.fetches(html)?;
        self.layers(html)?;
        self.unread(html)?;
        writeln!(
            html,
            "</main>\n<footer class=\"note\"><p>socinbd {}. Times are from the request of the attach on, or from the time when the daemon has \
             taken the attachment over. Reads from the page cache of the kernel are not seen.</p></footer>\n</body>\n</html>",
            env!("CARGO_PKG_VERSION")
        )
    }

    fn facts(&self, html: &mut String) -> fmt::Result {
        let it = &self.summary;
        let percent = |part: u64, whole: u64| match whole {
            0 => String::new(),
            _ => format!(" ({:.1} %)", part as f64 * 100.0 / whole as f64),
        };
        let facts = [
            (
                "Manifest",
                format!(
                    "<code class=\"short\">{}</code>",
                    short(&self.report.manifest.to_string())
                ),
            ),
            ("Time since the attach", seconds(self.report.age_ms as f64)),
            (
                "Mounted after",
                match self.report.mounted_ms {
                    0 => "taken over".to_owned(),
                    ms => seconds(ms as f64),
                },
            ),
            ("Layers", self.report.layers.len().to_string()),
            ("Compressed size of the image", output::bytes(it.size)),
            (
                "Fetched",
                output::bytes(it.counters.fetched_bytes)
                    + &percent(it.counters.fetched_bytes, it.size),
            ),
            ("Requests", it.counters.fetches.to_string()),
            (
                "Present spans",
                format!("{} of {}", it.present, it.spans) + &percent(it.present, it.spans),
            ),
            (
                "Reads that have waited",
                format!("{} of {}", it.counters.waits, it.counters.reads),
            ),
            (
                "Time with a waiting read",
                format!("{}, each moment once", seconds(it.waited_ms)),
            ),
        ];
        html.push_str("<dl class=\"facts\">\n");
        for (name, value) in facts {
            writeln!(html, "<div><dt>{name}</dt><dd>{value}</dd></div>")?;
        }
        html.push_str("</dl>\n");
        if it.dropped > 0 {
            writeln!(
                html,
                "<p class=\"note\">{} entries between the first and the last ones of the log were dropped, so sums by file are too small.</p>",
                it.dropped
            )?;
        }
        for (layer, why) in &it.unknown {
            writeln!(
                html,
                "<p class=\"note\">The files of layer <code>{}</code> are not known: {}</p>",
                short(layer),
                escape(why)
            )?;
        }
        Ok(())
    }

    fn timeline(&self, html: &mut String) -> fmt::Result {
        let files = &self.summary.files;
        html.push_str("<section aria-labelledby=\"timeline\">\n<h2 id=\"timeline\">Files that were waited for</h2>\n");
        if files.is_empty() {
            html.push_str("<p>No read has waited for data.</p>\n</section>\n");
            return Ok(());
        }
        html.push_str(
            "<ul class=\"key\">\
             <li><i><span class=\"wait\"></span></i>a read waits</li>\
             <li><i><span class=\"read\"></span></i>fetch that a read waits for</li>\
             <li><i><span class=\"ahead\"></span></i>fetch ahead of a read</li>\
             <li><i><span class=\"background\"></span></i>fetch in the background</li></ul>\n",
        );
        begin_table(
            html,
            &format!(
                "In the order of the first wait. The last column is the time from 0 to {}.",
                seconds(self.summary.end_ms)
            ),
            "Files that were waited for",
            &[
                "File",
                "Layer",
                "First wait",
                "Waits",
                "Waited",
                "Fetched",
                "Time",
            ],
        )?;
        for file in files.iter().take(FILES) {
            write!(
                html,
                "<tr><th scope=\"row\">{}</th><td><code class=\"short\">{}</code></td>\
                 <td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>\
                 <td class=\"time\">",
                file_name(file.path),
                short(&file.layer.to_string()),
                seconds(file.first_ms),
                file.waits,
                seconds(file.waited_ms),
                output::bytes(file.fetched_bytes),
            )?;
            self.bars(html, file)?;
            html.push_str("</td></tr>\n");
        }
        end_table(html, files.len(), FILES, "files")?;
        html.push_str("</section>\n");
        Ok(())
    }

    /// The waits and fetches of a file as bars. The cells beside them say the same in words.
    fn bars(&self, html: &mut String, file: &FileSummary<'_>) -> fmt::Result {
        html.push_str("<div class=\"track\" aria-hidden=\"true\">");
        for (class, at_ms, took_ms) in &file.bars {
            self.bar(html, class, *at_ms, *took_ms)?;
        }
        html.push_str("</div>");
        Ok(())
    }

    fn bar(&self, html: &mut String, class: &str, at_ms: f64, took_ms: f64) -> fmt::Result {
        let place = |ms: f64| (ms * 100.0 / self.summary.end_ms.max(1.0)).clamp(0.0, 100.0);
        let (left, right) = (place(at_ms), place(at_ms + took_ms));
        write!(
            html,
            "<span class=\"{class}\" style=\"left:{left:.2}%;width:{:.2}%\" title=\"{} for {}\"></span>",
            right - left,
            seconds(at_ms),
            seconds(took_ms)
        )
    }

    fn fetches(&self, html: &mut String) -> fmt::Result {
        let mut all: Vec<(&LayerFetches, &FileFetch)> = self
            .report
            .layers
            .iter()
            .flat_map(|layer| layer.fetches.iter().map(move |fetch| (layer, fetch)))
            .collect();
        all.sort_by_key(|(_, fetch)| fetch.at_ms);
        html.push_str("<section aria-labelledby=\"fetches\">\n<h2 id=\"fetches\">Fetches</h2>\n");
        let mut by_reason: HashMap<&str, (u64, u64)> = HashMap::new();
        for (_, fetch) in &all {
            let sum = by_reason.entry(reason(fetch.reason)).or_default();
            *sum = (sum.0 + 1, sum.1 + fetch.bytes);
        }
        html.push_str("<ul>\n");
        for why in [
            FetchReason::Read,
            FetchReason::Ahead,
            FetchReason::Background,
        ] {
            let (count, bytes) = by_reason.get(reason(why)).copied().unwrap_or_default();
            writeln!(
                html,
                "<li>{}: {count}, {}</li>",
                reason(why),
                output::bytes(bytes)
            )?;
        }
        writeln!(
            html,
            "</ul>\n<details><summary>All {} fetches</summary>",
            all.len()
        )?;
        begin_table(
            html,
            "In the order of their beginning.",
            "All fetches",
            &[
                "File that has caused it",
                "Beginning",
                "Duration",
                "Layer",
                "Spans",
                "Size",
                "Reason",
                "Files in the spans",
            ],
        )?;
        for (layer, fetch) in all.iter().take(FETCHES) {
            let mut files = fetch
                .files
                .iter()
                .map(|path| file_name(Some(path)))
                .collect::<Vec<_>>()
                .join(", ");
            if fetch.more_files > 0 {
                write!(files, " and {} more", fetch.more_files)?;
            }
            let failed = match fetch.is_ok {
                true => "",
                false => " <span class=\"failed\">failed</span>",
            };
            writeln!(
                html,
                "<tr><th scope=\"row\">{}</th><td class=\"number\">{}</td><td class=\"number\">{}</td><td><code class=\"short\">{}</code></td>\
                 <td class=\"number\">{}\u{2013}{}</td><td class=\"number\">{}</td><td>{}{failed}</td><td>{files}</td></tr>",
                match &fetch.cause {
                    Some(path) => file_name(Some(path)),
                    None => "\u{2013}".to_owned(),
                },
                seconds(fetch.at_ms as f64),
                seconds(fetch.took_ms),
                short(&layer.digest.to_string()),
                fetch.spans.0,
                fetch.spans.1.saturating_sub(1),
                output::bytes(fetch.bytes),
                reason(fetch.reason),
            )?;
        }
        end_table(html, all.len(), FETCHES, "fetches")?;
        html.push_str("</details>\n</section>\n");
        Ok(())
    }

    fn layers(&self, html: &mut String) -> fmt::Result {
        html.push_str("<section aria-labelledby=\"layers\">\n<h2 id=\"layers\">Layers</h2>\n");
        begin_table(
            html,
            "The topmost layer first. The map has a bar where spans are present.",
            "Layers",
            &["Layer", "Size", "Fetched", "Requests", "Spans", "Map"],
        )?;
        for layer in &self.report.layers {
            let runs = layer.present.iter();
            let present: u64 = runs.map(|run| u64::from(run.1.saturating_sub(run.0))).sum();
            let spans = match layer.spans {
                0 => "downloaded whole".to_owned(),
                all => format!("{present} of {all}"),
            };
            write!(
                html,
                "<tr><th scope=\"row\"><code>{}</code></th><td class=\"number\">{}</td><td class=\"number\">{}</td>\
                 <td class=\"number\">{}</td><td class=\"number\">{spans}</td><td class=\"time\"><div class=\"track\" aria-hidden=\"true\">",
                layer.digest,
                output::bytes(layer.size),
                output::bytes(layer.counters.fetched_bytes),
                layer.counters.fetches,
            )?;
            let place = |span: u32| f64::from(span) * 100.0 / f64::from(layer.spans.max(1));
            for (start, end) in joined(&layer.present, layer.spans) {
                write!(
                    html,
                    "<span class=\"present\" style=\"left:{:.2}%;width:{:.2}%\"></span>",
                    place(start),
                    place(end) - place(start)
                )?;
            }
            html.push_str("</div></td></tr>\n");
        }
        end_table(html, 0, 0, "layers")?;
        html.push_str("</section>\n");
        Ok(())
    }

    fn unread(&self, html: &mut String) -> fmt::Result {
        html.push_str("<section aria-labelledby=\"unread\">\n<h2 id=\"unread\">Files that no start has read</h2>\n");
        let it = &self.summary;
        writeln!(
            html,
            "<p>No byte of {} of {} files ({} of {}) is present on this machine, so no start has read them here. Files that share a span with \
             others may be present without having been read.</p>",
            it.unread_files,
            it.all_files,
            output::bytes(it.unread_bytes),
            output::bytes(it.all_bytes),
        )?;
        if !it.largest.is_empty() {
            begin_table(
                html,
                "The largest of them.",
                "Files that no start has read",
                &["File", "Layer", "Size"],
            )?;
            for (layer, file) in &it.largest {
                writeln!(
                    html,
                    "<tr><th scope=\"row\">{}</th><td><code class=\"short\">{}</code></td><td class=\"number\">{}</td></tr>",
                    file_name(Some(&file.path)),
                    short(&layer.to_string()),
                    output::bytes(file.bytes)
                )?;
            }
            end_table(html, 0, 0, "files")?;
        }
        html.push_str("</section>\n");
        Ok(())
    }
}

/// A table in a region that the keyboard can scroll.
fn begin_table(html: &mut String, caption: &str, label: &str, columns: &[&str]) -> fmt::Result {
    write!(
        html,
        "<div class=\"scroll\" role=\"region\" aria-label=\"{label}\" tabindex=\"0\"><table>\n<caption>{caption}</caption>\n<thead><tr>"
    )?;
    for column in columns {
        let class = match NUMBERS.contains(column) {
            true => " class=\"number\"",
            false => "",
        };
        write!(html, "<th scope=\"col\"{class}>{column}</th>")?;
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    Ok(())
}

fn end_table(html: &mut String, all: usize, shown: usize, what: &str) -> fmt::Result {
    html.push_str("</tbody></table></div>\n");
    match all.checked_sub(shown).filter(|more| *more > 0 && shown > 0) {
        Some(more) => writeln!(html, "<p class=\"note\">and {more} more {what}</p>"),
        None => Ok(()),
    }
}

/// Runs of spans, joined where less than a thousandth of the layer is between them: more is not visible.
fn joined(runs: &[(u32, u32)], spans: u32) -> Vec<(u32, u32)> {
    let mut joined: Vec<(u32, u32)> = Vec::new();
    for (start, end) in runs {
        match joined.last_mut() {
            Some(last) if start.saturating_sub(last.1) <= spans / 1000 => last.1 = *end,
            _ => joined.push((*start, *end)),
        }
    }
    joined
}

fn reason(reason: FetchReason) -> &'static str {
    match reason {
        FetchReason::Read => "a read waited",
        FetchReason::Ahead => "ahead of a read",
        FetchReason::Background => "in the background",
    }
}

fn file_name(path: Option<&str>) -> String {
    match path {
        Some(path) => format!("<code>{}</code>", escape(&cut(path))),
        None => "<span class=\"note\">not known</span>".to_owned(),
    }
}

/// A path of at most [`NAME`] characters: its beginning and its end.
fn cut(path: &str) -> Cow<'_, str> {
    let count = path.chars().count();
    if count <= NAME {
        return Cow::Borrowed(path);
    }
    let start = path.chars().take(NAME / 2);
    let end = path.chars().skip(count - NAME / 2);
    Cow::Owned(start.chain(['\u{2026}']).chain(end).collect())
}

fn seconds(ms: f64) -> String {
    match ms < 1000.0 {
        true => format!("{ms:.1} ms"),
        false => format!("{:.2} s", ms / 1000.0),
    }
}

/// The first digits of a digest.
fn short(digest: &str) -> String {
    let digits = digest.split_once(':').map_or(digest, |(_, digits)| digits);
    digits.chars().take(12).collect()
}

/// A text for an element or an attribute. Control characters, and those that change the direction of text, are shown as escapes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                escaped.extend(letter.escape_unicode());
            }
            letter if letter.is_control() => escaped.extend(letter.escape_default()),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_text_cannot_end_its_element_or_attribute() {
        assert_eq!(
            escape("<script>alert('x')</script>&\"\u{202e}\n"),
            "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&quot;\\u{202e}\\n"
        );
    }

    proptest! {
        #[test]
        fn no_text_has_markup_after_it_was_escaped(text in any::<String>()) {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains(['<', '>', '"', '\'']));
            prop_assert!(!escaped.chars().any(char::is_control));
        }
    }

    #[test]
    fn a_long_path_keeps_its_beginning_and_its_end() {
        assert_eq!(cut(&"a".repeat(NAME)).chars().count(), NAME);
        let long = format!("first{}last", "\u{e4}".repeat(5000));
        let cut = cut(&long);
        assert_eq!(cut.chars().count(), NAME + 1);
        assert!(cut.starts_with("first") && cut.ends_with("last"));
    }

    #[test]
    fn runs_that_cannot_be_told_apart_are_joined() {
        assert_eq!(
            joined(&[(0, 1), (2, 3), (2000, 2001)], 1000),
            [(0, 3), (2000, 2001)]
        );
        assert_eq!(joined(&[(0, 1), (2, 3)], 10), [(0, 1), (2, 3)]);
    }
}
