//! The help, as the definition of the command line gives it.

use clap::Command;
use socinbd::cli;

/// Each command with its words, the program itself first.
pub(super) fn commands() -> Vec<(String, Command)> {
    let mut root = cli::command().term_width(100);
    root.build();
    let mut found = Vec::new();
    let mut open = vec![("socinbd".to_owned(), root)];
    while let Some((words, command)) = open.pop() {
        for child in command.get_subcommands() {
            let words = format!("{words} {}", child.get_name());
            open.push((words, child.clone().term_width(100)));
        }
        found.push((words, command));
    }
    assert!(found.len() > 25, "{} commands", found.len());
    found
}

/// The headings of a help text, and the lines below each.
fn sections(help: &str) -> Vec<(&str, Vec<&str>)> {
    let mut sections: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in help.lines() {
        match line.strip_suffix(':') {
            Some(heading) if !line.starts_with(' ') => sections.push((heading, Vec::new())),
            _ if line.is_empty() => {}
            _ => sections
                .iter_mut()
                .last()
                .into_iter()
                .for_each(|(_, lines)| lines.push(line)),
        }
    }
    sections
}

#[test]
fn sections_come_in_one_order_and_end_with_examples() {
    const ORDER: [&str; 9] = [
        "Commands",
        "Arguments",
        "Options",
        "Registry options",
        "Index options",
        "Global options",
        "Image references",
        "Examples",
        "Exit status",
    ];
    let place = |heading: &str| ORDER.iter().position(|known| *known == heading);
    let mut wrong = Vec::new();
    for (words, mut command) in commands() {
        for help in [command.render_help(), command.render_long_help()] {
            let help = help.to_string();
            let sections = sections(&help);
            let headings: Vec<&str> = sections.iter().map(|(heading, _)| *heading).collect();
            let places: Vec<_> = headings.iter().map(|heading| place(heading)).collect();
            if !places.is_sorted() || places.contains(&None) {
                wrong.push(format!("{words}: {headings:?}"));
            }
            let is_example = |line: &&str| line.starts_with(&format!("  {words} "));
            let has_example = sections
                .iter()
                .any(|(heading, lines)| *heading == "Examples" && lines.iter().any(is_example));
            if !has_example || !headings.contains(&"Global options") {
                wrong.push(format!("{words}: no example, or no global options"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn options_take_one_line_each_in_the_short_help() {
    let mut wrong = Vec::new();
    for (words, mut command) in commands() {
        let help = command.render_help().to_string();
        for (heading, lines) in sections(&help) {
            let is_list = heading.ends_with("ptions") || heading == "Arguments";
            for line in lines.iter().filter(|_| is_list) {
                if !line.trim_start().starts_with(['-', '<', '[']) {
                    wrong.push(format!("{words}: {line}"));
                }
            }
        }
        for help in [help, command.render_long_help().to_string()] {
            let long = help.lines().filter(|line| line.chars().count() > 100);
            wrong.extend(long.map(|line| format!("{words}: {line}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Commands and switches are told in the imperative, and what has a value as a noun phrase. The third person is what a check can see.
#[test]
fn texts_are_in_one_mood() {
    let is_third_person = |text: &str| {
        let word = text.split([' ', ';', ':']).next().unwrap_or_default();
        let is_other = word.ends_with("ss") || ["Digests"].contains(&word);
        word.ends_with('s') && !is_other
    };
    let mut wrong = Vec::new();
    let mut check = |what: &str, text: String| {
        let is_sentence = text.ends_with('.') || text.contains('\n');
        if !text.starts_with(char::is_uppercase) && !text.starts_with("zTOC")
            || is_sentence
            || is_third_person(&text)
        {
            wrong.push(format!("{what}: {text:?}"));
        }
    };
    for (words, command) in commands() {
        check(&words, command.get_about().unwrap_or_default().to_string());
        for argument in command.get_arguments() {
            let what = format!("{words} {}", argument.get_id());
            check(&what, argument.get_help().unwrap_or_default().to_string());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
