//! The clients of others: libnbd's programs, QEMU's, fio, and the crate `nbd`, each with its own reading of the protocol.

use std::{
    io::{Read, Seek, SeekFrom},
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::Arc,
};

use socinbd::nbd::{Address, Exports, Limits, Server};

use super::export::{BLOCK, Block, Memory, Served};

/// 8 MiB: data, some of it absent at first, and two ranges of zeroes.
fn memory() -> Arc<Memory> {
    let memory = Memory::new(2048)
        .with(100..300, Block::Absent)
        .with(512..1024, Block::Zero)
        .with(2040..2048, Block::Zero);
    memory.open_gate();
    Arc::new(memory)
}

/// Runs a program; `package` is what Debian has it in.
fn run(package: &str, program: &str, arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} (package {package}): {error}"));
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Runs a program that must succeed, and returns its output.
fn output(package: &str, program: &str, arguments: &[&str]) -> String {
    let (success, stdout, stderr) = run(package, program, arguments);
    assert!(success, "{program} {arguments:?}\n{stdout}\n{stderr}");
    stdout
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn nbdinfo_reads_what_we_say_of_an_export() {
    let served = Served::one(&memory());
    let info = json(&output(
        "libnbd-bin",
        "nbdinfo",
        &["--json", &served.uri("")],
    ));
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    for (key, expected) in [
        ("export-size", serde_json::json!(2048 * BLOCK)),
        ("is_read_only", true.into()),
        ("can_cache", true.into()),
        ("can_df", true.into()),
        ("can_multi_conn", true.into()),
        ("can_trim", false.into()),
        ("can_flush", false.into()),
        ("block_size_minimum", 1.into()),
        ("block_size_preferred", 4096.into()),
        ("block_size_maximum", (32 << 20).into()),
        ("contexts", serde_json::json!(["base:allocation"])),
    ] {
        assert_eq!(export[key], expected, "{key} in {export}");
    }
}

#[test]
fn nbdinfo_lists_the_exports_of_an_image() {
    let mut exports = Exports::new();
    for (name, description) in [("sha256:aa", "layer 0"), ("sha256:bb", "layer 1")] {
        exports.add(name, description, memory()).unwrap();
    }
    let served = Served::new(exports, Limits::default());
    let arguments = ["--json", "--list", "--no-content", &served.uri("")];
    let info = json(&output("libnbd-bin", "nbdinfo", &arguments));
    let names: Vec<_> = info["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| (export["export-name"].clone(), export["description"].clone()))
        .collect();
    assert_eq!(
        names,
        [
            ("sha256:aa".into(), "layer 0".into()),
            ("sha256:bb".into(), "layer 1".into())
        ]
    );
    let size = output(
        "libnbd-bin",
        "nbdinfo",
        &["--size", &served.uri("sha256:bb")],
    );
    assert_eq!(size.trim(), (2048 * BLOCK).to_string());
    // no default export among two
    assert!(!run("libnbd-bin", "nbdinfo", &[&served.uri("")]).0);
}

#[test]
fn nbdinfo_and_qemu_img_map_the_same_extents() {
    let served = Served::one(&memory());
    let uri = served.uri("");
    let extents =
        |text: &str, start: &str, length: &str, zero: &dyn Fn(&serde_json::Value) -> bool| {
            json(text)
                .as_array()
                .unwrap()
                .iter()
                .map(|extent| {
                    let block = |key: &str| extent[key].as_u64().unwrap() / BLOCK;
                    (block(start), block(length), zero(extent))
                })
                .collect::<Vec<_>>()
        };
    let expected = [
        (0, 512, false),
        (512, 512, true),
        (1024, 1016, false),
        (2040, 8, true),
    ];
    let map = output("libnbd-bin", "nbdinfo", &["--map", "--json", &uri]);
    let found = extents(&map, "offset", "length", &|extent| extent["type"] == 3);
    assert_eq!(found, expected);
    let map = output(
        "qemu-utils",
        "qemu-img",
        &["map", "--output=json", "-f", "raw", &uri],
    );
    let found = extents(&map, "start", "length", &|extent| extent["zero"] == true);
    assert_eq!(found, expected);
}

#[test]
fn nbdcopy_and_qemu_img_copy_every_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("copy");
    let path = file.to_str().unwrap();
    for (package, program, arguments) in [
        ("libnbd-bin", "nbdcopy", &["URI", "FILE"][..]),
        ("libnbd-bin", "nbdcopy", &["--synchronous", "URI", "FILE"]),
        (
            "libnbd-bin",
            "nbdcopy",
            &[
                "--connections=4",
                "--requests=64",
                "--request-size=2097152",
                "URI",
                "FILE",
            ],
        ),
        (
            "qemu-utils",
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", "URI", "FILE"],
        ),
        (
            "qemu-utils",
            "qemu-img",
            &[
                "convert", "-W", "-m", "16", "-f", "raw", "-O", "raw", "URI", "FILE",
            ],
        ),
    ] {
        let memory = memory();
        let served = Served::one(&memory);
        let uri = served.uri("");
        let arguments: Vec<_> = arguments
            .iter()
            .map(|argument| match *argument {
                "URI" => &uri,
                "FILE" => path,
                other => other,
            })
            .collect();
        output(package, program, &arguments);
        assert!(
            std::fs::read(&file).unwrap() == memory.data(),
            "{program} {arguments:?}"
        );
        std::fs::remove_file(&file).unwrap();
        served.wait_for_connections(0);
    }
}

#[test]
fn qemu_img_info_and_compare() {
    let memory = memory();
    let served = Served::one(&memory);
    let uri = served.uri("");
    let info = json(&output(
        "qemu-utils",
        "qemu-img",
        &["info", "--output=json", &uri],
    ));
    assert_eq!(info["virtual-size"], 2048 * BLOCK);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("same");
    std::fs::write(&file, memory.data()).unwrap();
    let path = file.to_str().unwrap();
    let compare = ["compare", "-f", "raw", "-F", "raw", &uri, path];
    output("qemu-utils", "qemu-img", &compare);
    let mut data = memory.data().to_vec();
    data[1_000_000] ^= 1;
    std::fs::write(&file, data).unwrap();
    assert!(
        !run("qemu-utils", "qemu-img", &compare).0,
        "one changed byte is found"
    );
}

#[test]
fn qemu_nbd_lists_over_tcp() {
    let served = Served::one(&memory());
    let server = Server::listen_tcp(
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        Arc::clone(&served.exports),
        served.runtime(),
        Limits::default(),
    )
    .unwrap();
    let Address::Tcp(address) = server.address() else {
        panic!("{}", server.address());
    };
    let port = address.port().to_string();
    let list = output(
        "qemu-utils",
        "qemu-nbd",
        &["--list", "--bind=127.0.0.1", "--port", &port],
    );
    assert!(list.contains("exports available: 1"), "{list}");
    assert!(list.contains("size:  8388608"), "{list}");
    let size = output(
        "libnbd-bin",
        "nbdinfo",
        &["--size", &server.address().uri("")],
    );
    assert_eq!(size.trim(), "8388608");
}

#[test]
fn fio_verifies_nothing_but_reads_all() {
    let memory = memory();
    let served = Served::one(&memory);
    for (pattern, block, depth) in [
        ("randread", "4k", "16"),
        ("read", "128k", "4"),
        ("randread", "512", "1"),
    ] {
        let arguments = [
            "--name=read",
            "--ioengine=nbd",
            &format!("--uri={}", served.uri("")),
            &format!("--rw={pattern}"),
            &format!("--bs={block}"),
            &format!("--iodepth={depth}"),
            "--size=8m",
            "--io_size=8m",
            "--output-format=json",
        ];
        let before = served.exports.counters().get();
        let report = output("fio", "fio", &arguments);
        let report = json(&report[report.find('{').unwrap()..]);
        assert_eq!(report["jobs"][0]["error"], 0);
        assert_eq!(report["jobs"][0]["read"]["io_bytes"], 8 << 20);
        let after = served.exports.counters().get();
        assert_eq!(after.read_bytes - before.read_bytes, 8 << 20);
        assert_eq!(after.errors, 0);
    }
}

#[test]
fn libnbd_sees_errors_as_errnos() {
    let memory = Memory::new(16).with(4..5, Block::Failing(socinbd::error::Kind::Unavailable));
    memory.open_gate();
    let served = Served::one(&Arc::new(memory));
    let script = r#"
import errno
def fails(code, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == code, (error.errnum, code)
    else:
        raise SystemExit("no error")
h.set_strict_mode(0)
fails(errno.EIO, h.pread, 512, 4 * 4096)
fails(errno.EPERM, h.pwrite, b"x" * 512, 0)
fails(errno.EPERM, h.trim, 512, 0)
fails(errno.EPERM, h.zero, 512, 0)
fails(errno.EINVAL, h.pread, 512, 16 * 4096)
h.flush()
h.cache(4096, 0)
assert len(h.pread(512, 0)) == 512
assert len(h.pread_structured(512, 0, lambda *a: 0, nbd.CMD_FLAG_DF)) == 512
"#;
    // what nbdsh runs, but with the distribution's Python, whichever one is first in PATH
    let arguments = ["-m", "nbd", "-u", &served.uri(""), "-c", script];
    output("python3-libnbd", "/usr/bin/python3", &arguments);
}

#[test]
fn the_client_of_the_crate_nbd_reads() {
    let memory = memory();
    let mut exports = Exports::new();
    exports
        .add("sha256:aa", "", Arc::clone(&memory) as Arc<_>)
        .unwrap();
    let served = Served::new(exports, Limits::default());
    let mut stream = served.connect();
    let export = ::nbd::client::handshake(&mut stream, b"sha256:aa").unwrap();
    assert_eq!(export.size, 2048 * BLOCK);
    assert!(export.readonly);
    let mut client = ::nbd::client::NbdClient::new(stream, &export);
    client.seek(SeekFrom::Start(99 * BLOCK + 5)).unwrap();
    let mut data = vec![0; 3 * BLOCK as usize];
    client.read_exact(&mut data).unwrap();
    let start = 99 * BLOCK as usize + 5;
    assert!(data == memory.data()[start..start + data.len()]);
}
