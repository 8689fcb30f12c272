//! Versions of what one daemon leaves to the next: a program reads the version that it writes and the one before. Versions start at 1.

/// Whether a program that writes version `own` reads version `found`.
pub(crate) fn is_read(found: u32, own: u32) -> bool {
    found != 0 && (found == own || found.checked_add(1) == Some(own))
}

/// The versions that a program reads which writes version `own`, as words.
pub(crate) fn readable(own: u32) -> String {
    match own {
        1 => "version 1".to_owned(),
        own => format!("versions {} and {own}", own.saturating_sub(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_reads_its_own_version_and_the_one_before() {
        let read: Vec<u32> = (0..6).filter(|found| is_read(*found, 3)).collect();
        assert_eq!(read, [2, 3]);
        assert!(is_read(1, 1) && !is_read(0, 1) && !is_read(2, 1) && !is_read(0, 0));
        assert!(!is_read(u32::MAX, 3));
        assert_eq!(readable(1), "version 1");
        assert_eq!(readable(3), "versions 2 and 3");
    }
}
