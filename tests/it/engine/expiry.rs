//! An image that is read while its credentials end again and again.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use super::{Host, lifecycle::indexed};
use crate::support::{
    credential_plugin::CredentialPlugin,
    registry::{Auth, DATED_PASSWORD, Kind, Link, Redirects, Registry},
    seeded_noise,
    tars::Layer,
};

const LIFETIME: Duration = Duration::from_secs(1);
const READERS: u64 = 4;

#[test]
fn readers_of_an_image_across_several_expiries_see_none() {
    let host = Host::new();
    let files: Vec<Vec<u8>> = (0..READERS).map(|it| seeded_noise(1_500_000, it)).collect();
    let named = files.iter().enumerate();
    let layers = named.map(|(number, content)| Layer::new().file(&number.to_string(), content));
    let layout = indexed(&host, layers.collect());
    let registry = Registry::start();
    registry.add_layout("app", layout.path()).unwrap();
    registry.set_auth(Auth::Dated { lifetime: LIFETIME });
    registry.set_redirects(Some(Redirects {
        lifetime: LIFETIME,
        expired_status: 400,
    }));
    // all of it takes five seconds
    registry.set_link(Link {
        bytes_per_second: 1_200_000,
        ..Link::default()
    });
    let plugin = CredentialPlugin::new(DATED_PASSWORD, "1h").for_registry(&registry.host());
    let options = plugin.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let mountpoint = host.mountpoint("mnt");
    host.attach(&registry.reference("app"), &mountpoint, &options);
    let begun = Instant::now();
    thread::scope(|scope| {
        for (number, content) in files.iter().enumerate() {
            let file = mountpoint.join(number.to_string());
            scope.spawn(move || assert!(fs::read(file).unwrap() == *content));
        }
    });
    let time = begun.elapsed();
    let log = registry.counters().log;
    let refused = |kind, status| {
        let refused = log
            .iter()
            .filter(|it| it.kind == kind && it.status == status);
        refused.count()
    };
    println!(
        "{:.1} s, {} runs of the plugin, {} times 403, {} times 400",
        time.as_secs_f64(),
        plugin.runs(),
        refused(Kind::Blob, 403),
        refused(Kind::Cdn, 400)
    );
    assert!(time > LIFETIME * 3, "{time:?}");
    // a body that began before its URL expired goes on, so there may be no 400
    assert!(refused(Kind::Blob, 403) >= 2 && plugin.runs() >= 2);
    let mut of_cdn = log.iter().filter(|entry| entry.kind == Kind::Cdn);
    assert!(of_cdn.all(|entry| !entry.headers.contains_key("authorization")));
    host.detach(&mountpoint);
    assert_eq!(host.left_over(), [""; 0]);
}
