//! The page of `report`, as a browser shows it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use super::apart;
use crate::{
    engine::{Host, lifecycle::indexed},
    support::{registry::Registry, tars::Layer},
};

/// A name that is markup where it is not escaped.
const HOSTILE: &str = "<script>document.title='taken'<\\script><img src=x onerror=alert(1)>\"'&";

/// What a browser has seen of a page.
struct Seen {
    /// The document after it was loaded.
    dom: String,
    /// Messages of the console.
    console: Vec<String>,
    /// Addresses that the page has requested, whether or not there was an answer.
    requests: Vec<String>,
}

/// Looks at a page with headless Chromium.
fn look(page: &Path, folder: &Path, options: &[&str]) -> Seen {
    let log = folder.join("net.json");
    let output = Command::new("chromium")
        .args(
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
                .split(' '),
        )
        .args("--enable-logging=stderr --v=0 --window-size=1200,1500".split(' '))
        // what the browser asks for on its own leads nowhere
        .arg("--host-resolver-rules=MAP * ~NOTFOUND")
        .arg(format!(
            "--user-data-dir={}",
            folder.join("profile").display()
        ))
        .arg(format!("--log-net-log={}", log.display()))
        .args(options)
        .arg(format!("file://{}", page.display()))
        .env("HOME", folder)
        .output()
        .expect("this test needs chromium (scripts/setup test installs it)");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let log: Value = serde_json::from_slice(&fs::read(log).unwrap()).unwrap();
    let events = log["events"].as_array().unwrap().iter();
    let of_page = events.filter(|event| {
        let initiator = event["params"]["initiator"].as_str();
        initiator.is_some_and(|initiator| initiator != "not an origin") // that of the browser itself
    });
    Seen {
        dom: String::from_utf8(output.stdout).unwrap(),
        console: said
            .lines()
            .filter(|line| line.contains("CONSOLE"))
            .map(str::to_owned)
            .collect(),
        requests: of_page
            .filter_map(|event| Some(event["params"]["url"].as_str()?.to_owned()))
            .collect(),
    }
}

#[test]
fn the_browser_tells_of_requests_and_of_the_console() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let html =
        "<!doctype html><script>console.error('fault')</script><img src=\"http://127.0.0.1:9/x\">";
    fs::write(&page, html).unwrap();
    let seen = look(&page, folder.path(), &["--dump-dom"]);
    assert_eq!(seen.requests, ["http://127.0.0.1:9/x"]);
    assert!(seen.console[0].contains("fault"), "{:?}", seen.console);
}

/// A host, and the page of a start of an image from a registry.
fn reported(folder: &Path) -> PathBuf {
    let host = Host::new();
    let other = Layer::new().file("etc/config", b"text\n");
    let layout = indexed(&host, vec![apart(HOSTILE), other]);
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &[]);
    for name in ["usr/bin/program", HOSTILE] {
        fs::read(mountpoint.join(name)).unwrap();
    }
    let page = folder.join("start.html");
    host.run(&[
        "report",
        &registry.reference("app"),
        "-o",
        page.to_str().unwrap(),
    ]);
    let to_stdout = host.run(&["report", "-o", "-"]);
    assert!(to_stdout.starts_with("<!doctype html>"));
    host.fail(&["report"], 2);
    host.fail(&["report", "registry.example/other", "-o", "-"], 3);
    host.detach(&mountpoint);
    page
}

#[test]
fn the_page_of_a_start_needs_nothing_else_and_hostile_names_are_text() {
    let folder = tempfile::tempdir().unwrap();
    let page = reported(folder.path());
    let html = fs::read_to_string(&page).unwrap();
    assert!(
        !html.contains("<script") && !html.contains("<img"),
        "{html}"
    );
    let shown = HOSTILE
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let with_quotes = shown.replace('"', "&quot;").replace('\'', "&#39;");
    assert!(html.contains(&with_quotes), "{html}");
    let html = html.replace(&with_quotes, "");
    for reference in ["http:", "https:", "src=", "url(", "@import", "<link"] {
        assert!(!html.contains(reference), "{reference}");
    }
    let Seen {
        dom,
        console,
        requests,
    } = look(&page, folder.path(), &["--dump-dom"]);
    assert_eq!((console, requests), (Vec::new(), Vec::new()));
    assert!(dom.contains("<title>Start of "), "{dom}");
    assert!(!dom.contains("<script") && !dom.contains("<img"), "{dom}");
    assert!(dom.contains(&format!("<code>{shown}</code>")), "{dom}");
    for (name, count) in [
        ("<code>usr/bin/program</code>", 2),
        ("<code>etc/config</code>", 1),
        ("<code>usr/share/unread</code>", 1),
        ("class=\"wait\"", 3),
        ("class=\"read\"", 3),
        ("class=\"present\"", 2),
    ] {
        assert!(dom.matches(name).count() >= count, "{name}:\n{dom}");
    }
}

#[test]
fn the_page_is_used_with_a_keyboard_and_a_screen_reader_and_in_the_dark() {
    let folder = tempfile::tempdir().unwrap();
    let page = reported(folder.path());
    let dom = look(&page, folder.path(), &["--dump-dom"]).dom;
    assert!(dom.contains("<html lang=\"en\">"));
    // one first heading, a heading for each section, names for tables and for the regions that scroll
    assert_eq!(dom.matches("<h1").count(), 1);
    let sections = dom.matches("<section aria-labelledby=\"").count();
    assert_eq!((sections, dom.matches("<h2 id=\"").count()), (4, 4));
    let tables = dom.matches("<table>").count();
    assert!(tables >= 4, "{tables}");
    assert_eq!(dom.matches("<caption>").count(), tables);
    let regions = dom.matches("role=\"region\" aria-label=\"").count();
    assert_eq!(
        (regions, dom.matches("tabindex=\"0\"").count()),
        (tables, tables)
    );
    assert_eq!(
        dom.matches("<th scope=\"row\">").count(),
        dom.matches("<tr>").count() - tables
    );
    // each link leads to a place of the page
    for link in dom.split("href=\"").skip(1) {
        let target = link.split('"').next().unwrap();
        let id = target.strip_prefix('#').unwrap();
        assert!(dom.contains(&format!("id=\"{id}\"")), "{target}");
    }
    // bars say nothing that the cells do not say
    let bars = dom.matches("<div class=\"track\"").count();
    assert_eq!(
        bars,
        dom.matches("<div class=\"track\" aria-hidden=\"true\"")
            .count()
    );

    // kept for people to look at
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&kept).unwrap();
    let mut pictures = Vec::new();
    for (name, options) in [
        ("light.png", &[][..]),
        ("dark.png", &["--blink-settings=preferredColorScheme=0"][..]),
    ] {
        let file = kept.join(name);
        let screenshot = format!("--screenshot={}", file.display());
        look(
            &page,
            folder.path(),
            &[&[&screenshot[..]], options].concat(),
        );
        pictures.push(fs::read(file).unwrap());
    }
    assert_ne!(pictures[0], pictures[1], "the colours differ");
}
