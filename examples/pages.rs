//! Writes the manual pages and the shell completions, from the definition of the command line.
//!
//! `cargo run --example pages -- DIR` writes `DIR/man/man1/socinbd*.1`, a page for each command, and `DIR/completions`, with a file for
//! each of bash, fish and zsh under the name that the shell looks for.

use std::{fs, io, path::Path, process::ExitCode};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// Writes everything below a directory.
pub fn write(folder: &Path) -> io::Result<()> {
    let (pages, completions) = (folder.join("man/man1"), folder.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let mut command = socinbd::cli::command();
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command, "socinbd", &completions)?;
    }
    command.build();
    write_pages(&command, "socinbd", &pages)
}

/// Writes the page of a command, and those of its subcommands.
fn write_pages(command: &Command, name: &str, pages: &Path) -> io::Result<()> {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").to_owned();
    let page = Man::new(command.clone().override_usage(usage))
        .title(name.to_uppercase())
        .source(format!("socinbd {}", env!("CARGO_PKG_VERSION")))
        .manual("socinbd manual");
    let mut bytes = Vec::new();
    page.render_title(&mut bytes)?;
    page.render_name_section(&mut bytes)?;
    page.render_synopsis_section(&mut bytes)?;
    page.render_description_section(&mut bytes)?;
    page.render_options_section(&mut bytes)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut bytes)?;
    }
    let end = command.get_after_help().map(ToString::to_string);
    bytes.extend(sections(&end.unwrap_or_default()).as_bytes());
    fs::write(pages.join(format!("{name}.1")), bytes)?;
    for child in command.get_subcommands() {
        write_pages(child, &format!("{name}-{}", child.get_name()), pages)?;
    }
    Ok(())
}

/// The text after the options as sections of a page: one for each heading, with its lines as they are.
fn sections(text: &str) -> String {
    let mut page = String::new();
    for line in text.lines() {
        match line.strip_suffix(':') {
            Some(heading) if !line.starts_with(' ') => {
                page.push_str(&format!(".SH {}\n.nf\n", escaped(&heading.to_uppercase())));
            }
            _ if line.is_empty() => page.push_str(".fi\n"),
            _ => page.push_str(&format!(
                "{}\n",
                escaped(line.strip_prefix("  ").unwrap_or(line))
            )),
        }
    }
    page.push_str(".fi\n");
    page
}

/// A line of text for roff, in which a backslash, a hyphen and a dot or quote at the start have a meaning of their own.
fn escaped(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-");
    let is_control = text.starts_with(['.', '\'']);
    format!("{}{text}", if is_control { "\\&" } else { "" })
}

#[allow(dead_code, reason = "the tests include this file as a module")]
fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        eprintln!("usage: pages DIR");
        return ExitCode::from(2);
    };
    match write(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pages: {}: {error}", Path::new(&folder).display());
            ExitCode::FAILURE
        }
    }
}
