//! zot: a registry with the referrers API.

use serde_json::json;

use super::served::Served;

/// Starts the zot that the environment variable `ZOT` names, with an empty folder. Where it names none, a test says so and does without.
pub fn start() -> Option<Served> {
    let Some(program) = std::env::var_os("ZOT").filter(|program| !program.is_empty()) else {
        eprintln!("not run with zot: the environment variable ZOT names no program");
        return None;
    };
    Some(Served::start(&program, "what ZOT names", |data, host| {
        let (address, port) = host.split_once(':').expect("an address and a port");
        json!({
            "distSpecVersion": "1.1.1",
            "storage": {"rootDirectory": data, "gc": false},
            "http": {"address": address, "port": port},
            "log": {"level": "error"},
        })
        .to_string()
    }))
}
