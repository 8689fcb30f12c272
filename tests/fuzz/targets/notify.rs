//! Any bytes as a datagram to the keeper.

#![no_main]

use libfuzzer_sys::fuzz_target;
use socinbd::keeper::message::Message;

fuzz_target!(|bytes: &[u8]| {
    match Message::parse(bytes) {
        Ok(message) => {
            let text = message.to_string();
            assert_eq!(Message::parse(text.as_bytes()).unwrap(), message);
        }
        Err(error) => assert!(!error.report().is_empty()),
    }
});
