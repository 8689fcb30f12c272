//! Names of attachments in mount tables and in messages.

use crate::error::{Error, Kind, Result, ResultExt as _};

/// The source of an attachment's mount, as in /proc/self/mountinfo.
pub fn mount_source(id: &str) -> String {
    format!("socinbd-{id}")
}

pub(in crate::engine) fn unknown(id: &str) -> Error {
    Error::new(
        Kind::NotFound,
        format!("this daemon has no attachment {id:?}"),
    )
}

/// 16 random hexadecimal digits.
pub(super) fn random_digits() -> Result<String> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .or_kind(Kind::Io, || "getting random bytes".into())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}
