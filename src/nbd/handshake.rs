//! The handshake: fixed newstyle negotiation, within a time limit and in bounded memory.

use std::{sync::Arc, time::Duration};

use zerocopy::IntoBytes;

use super::{
    MAX_PAYLOAD, TRANSMISSION_FLAGS,
    error::ConnectionError,
    export::{Exports, Named},
    protocol::{
        options::{InfoRequest, Malformed, MetaContextRequest, text},
        *,
    },
    stream::Stream,
    timed::{MAX_OPTION_DATA, Timed},
};
use crate::layer::ServedDisk;

/// Bytes of option data that are skipped, and answered with `NBD_REP_ERR_TOO_BIG`; a client that sends more is cut off.
const MAX_SKIPPED_DATA: u32 = 1 << 20;

/// The id of the context `base:allocation`.
pub(super) const ALLOCATION_CONTEXT: u32 = 1;

/// The result of the negotiation.
pub(super) struct Session {
    pub(super) export: Arc<dyn ServedDisk>,
    /// Replies to reads are structured.
    pub(super) structured: bool,
    /// `base:allocation` was chosen for this export.
    pub(super) allocation: bool,
}

/// Negotiates; `None` when the client ended it without choosing an export.
pub(super) fn negotiate(
    stream: &Stream,
    exports: &Exports,
    limit: Duration,
) -> Result<Option<Session>, ConnectionError> {
    let mut haggling = Haggling {
        wire: Timed::new(stream, limit),
        exports,
        no_zeroes: false,
        structured: false,
        contexts_of: None,
    };
    let session = haggling.run()?;
    haggling.wire.lift()?;
    Ok(session)
}

/// The state of "option haggling".
struct Haggling<'a> {
    wire: Timed<'a, Stream>,
    exports: &'a Exports,
    no_zeroes: bool,
    structured: bool,
    /// The place of the export that `base:allocation` is chosen for.
    contexts_of: Option<usize>,
}

/// The next step after an option.
enum Next {
    Option,
    Transmission(Session),
    End,
}

impl Haggling<'_> {
    fn run(&mut self) -> Result<Option<Session>, ConnectionError> {
        self.greet()?;
        loop {
            let header: OptionHeader = self.wire.receive()?;
            if header.magic.get() != NBD_OPTS_MAGIC {
                return Err(ConnectionError::OptionMagic {
                    found: header.magic.get(),
                });
            }
            match self.option(header.option.get(), header.length.get())? {
                Next::Option => {}
                Next::Transmission(session) => return Ok(Some(session)),
                Next::End => return Ok(None),
            }
        }
    }

    fn greet(&mut self) -> Result<(), ConnectionError> {
        let greeting = Greeting {
            magic: NBD_MAGIC.into(),
            option_magic: NBD_OPTS_MAGIC.into(),
            handshake_flags: (NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).into(),
        };
        self.wire.send(greeting.as_bytes())?;
        let client: ClientFlags = self.wire.receive()?;
        let flags = client.flags.get();
        // "the server MUST drop the TCP connection if the client sets an unknown flag"
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return Err(ConnectionError::ClientFlags { flags });
        }
        self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        Ok(())
    }

    fn option(&mut self, option: u32, length: u32) -> Result<Next, ConnectionError> {
        if length > MAX_OPTION_DATA {
            if length > MAX_SKIPPED_DATA || option == NBD_OPT_EXPORT_NAME {
                return Err(ConnectionError::OptionLength { option, length });
            }
            self.wire.skip(length)?;
            return self.refuse(option, NBD_REP_ERR_TOO_BIG, "too much data in one option");
        }
        let data = self.wire.receive_data(length)?;
        match option {
            NBD_OPT_EXPORT_NAME => self.export_name(&data).map(Next::Transmission),
            NBD_OPT_ABORT => {
                // the client may be gone already, and need not wait for this
                let _ = self.reply(option, NBD_REP_ACK, &[]);
                Ok(Next::End)
            }
            NBD_OPT_LIST | NBD_OPT_STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(option, NBD_REP_ERR_INVALID, "this option has no data")
            }
            NBD_OPT_LIST => self.list(),
            NBD_OPT_STRUCTURED_REPLY => {
                self.structured = true;
                self.accept(option)
            }
            NBD_OPT_INFO | NBD_OPT_GO => match InfoRequest::parse(&data) {
                Ok(request) => self.info(option, &request),
                Err(error) => self.malformed(option, error),
            },
            NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => {
                if option == NBD_OPT_SET_META_CONTEXT {
                    // "replaces all previously-set metadata contexts (including when this command fails)"
                    self.contexts_of = None;
                }
                match MetaContextRequest::parse(&data) {
                    Ok(request) => self.meta_context(option, &request),
                    Err(error) => self.malformed(option, error),
                }
            }
            _ => self.refuse(option, NBD_REP_ERR_UNSUP, "option not supported"),
        }
    }

    fn export_name(&mut self, data: &[u8]) -> Result<Session, ConnectionError> {
        // this option has no error reply: "the server MUST terminate the session"
        let name = text(data).map_err(ConnectionError::ExportName)?;
        let (index, named) =
            self.exports
                .find(name)
                .ok_or_else(|| ConnectionError::UnknownExport {
                    name: name.to_owned(),
                })?;
        let session = self.session(index, named);
        let reply = ExportNameReply {
            size: named.export.size().into(),
            transmission_flags: self.transmission_flags().into(),
        };
        let mut bytes = reply.as_bytes().to_vec();
        if !self.no_zeroes {
            bytes.resize(bytes.len() + EXPORT_NAME_ZEROES, 0);
        }
        self.wire.send(&bytes)?;
        Ok(session)
    }

    fn list(&mut self) -> Result<Next, ConnectionError> {
        let exports = self.exports;
        for named in exports.listed() {
            let mut data = length_of(&named.name).to_be_bytes().to_vec();
            data.extend(named.name.as_bytes());
            data.extend(named.description.as_bytes());
            self.reply(NBD_OPT_LIST, NBD_REP_SERVER, &data)?;
        }
        self.accept(NBD_OPT_LIST)
    }

    fn info(&mut self, option: u32, request: &InfoRequest<'_>) -> Result<Next, ConnectionError> {
        let exports = self.exports;
        let Some((index, named)) = exports.find(request.name) else {
            return self.unknown(option, request.name);
        };
        let export = InfoExport {
            info_type: NBD_INFO_EXPORT.into(),
            size: named.export.size().into(),
            transmission_flags: self.transmission_flags().into(),
        };
        self.reply(option, NBD_REP_INFO, export.as_bytes())?;
        for (info_type, text) in [
            (NBD_INFO_NAME, &named.name),
            (NBD_INFO_DESCRIPTION, &named.description),
        ] {
            if request.wants(info_type) {
                let data = [&info_type.to_be_bytes(), text.as_bytes()].concat();
                self.reply(option, NBD_REP_INFO, &data)?;
            }
        }
        if request.wants(NBD_INFO_BLOCK_SIZE) {
            let sizes = InfoBlockSize {
                info_type: NBD_INFO_BLOCK_SIZE.into(),
                minimum: 1.into(),
                preferred: 4096.into(),
                maximum_payload: MAX_PAYLOAD.into(),
            };
            self.reply(option, NBD_REP_INFO, sizes.as_bytes())?;
        }
        let next = self.accept(option)?;
        if option == NBD_OPT_GO {
            return Ok(Next::Transmission(self.session(index, named)));
        }
        Ok(next)
    }

    fn meta_context(
        &mut self,
        option: u32,
        request: &MetaContextRequest<'_>,
    ) -> Result<Next, ConnectionError> {
        if !self.structured {
            let why = "metadata contexts need structured replies: negotiate these first";
            return self.refuse(option, NBD_REP_ERR_INVALID, why);
        }
        let Some((index, _)) = self.exports.find(request.name) else {
            return self.unknown(option, request.name);
        };
        // queries of other namespaces, and of other names below `base:`, "MUST" be ignored
        let named = request.queries.contains(&BASE_ALLOCATION);
        let (found, id) = if option == NBD_OPT_SET_META_CONTEXT {
            (named, ALLOCATION_CONTEXT)
        } else {
            let all = request.queries.is_empty() || request.queries.contains(&"base:");
            (named || all, 0)
        };
        if found {
            let data = [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()].concat();
            self.reply(option, NBD_REP_META_CONTEXT, &data)?;
            if option == NBD_OPT_SET_META_CONTEXT {
                self.contexts_of = Some(index);
            }
        }
        self.accept(option)
    }

    fn session(&self, index: usize, named: &Named) -> Session {
        Session {
            export: Arc::clone(&named.export),
            structured: self.structured,
            allocation: self.contexts_of == Some(index),
        }
    }

    fn transmission_flags(&self) -> u16 {
        // "MUST leave this flag clear if structured replies have not been negotiated"
        TRANSMISSION_FLAGS | if self.structured { NBD_FLAG_SEND_DF } else { 0 }
    }

    fn accept(&mut self, option: u32) -> Result<Next, ConnectionError> {
        self.reply(option, NBD_REP_ACK, &[])?;
        Ok(Next::Option)
    }

    fn malformed(&mut self, option: u32, error: Malformed) -> Result<Next, ConnectionError> {
        self.refuse(option, NBD_REP_ERR_INVALID, &error.to_string())
    }

    fn unknown(&mut self, option: u32, name: &str) -> Result<Next, ConnectionError> {
        let why = match name {
            "" => "there is no default export: give a name (NBD_OPT_LIST lists the exports)",
            _ => "there is no export of this name (NBD_OPT_LIST lists the exports)",
        };
        self.refuse(option, NBD_REP_ERR_UNKNOWN, why)
    }

    fn refuse(&mut self, option: u32, reply_type: u32, why: &str) -> Result<Next, ConnectionError> {
        self.reply(option, reply_type, why.as_bytes())?;
        Ok(Next::Option)
    }

    fn reply(&mut self, option: u32, reply_type: u32, data: &[u8]) -> Result<(), ConnectionError> {
        let header = OptionReply {
            magic: NBD_REP_MAGIC.into(),
            option: option.into(),
            reply_type: reply_type.into(),
            length: length_of(data).into(),
        };
        self.wire.send(&[header.as_bytes(), data].concat())
    }
}

/// Names, descriptions and messages are at most [`MAX_STRING`] bytes each, so that all replies fit.
fn length_of(data: impl AsRef<[u8]>) -> u32 {
    u32::try_from(data.as_ref().len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::net::UnixStream};

    use super::*;

    /// In transmission a client may be silent for as long as it likes.
    #[test]
    fn the_time_limit_ends_with_the_handshake() {
        let (server, mut client) = UnixStream::pair().unwrap();
        client.write_all(&[0, 0, 0, 3]).unwrap();
        client.write_all(b"IHAVEOPT\0\0\0\x02\0\0\0\0").unwrap();
        let stream = Stream::from(server.try_clone().unwrap());
        let session = negotiate(&stream, &Exports::new(), Duration::from_secs(10)).unwrap();
        assert!(session.is_none(), "NBD_OPT_ABORT");
        assert_eq!(server.read_timeout().unwrap(), None);
        assert_eq!(server.write_timeout().unwrap(), None);
    }
}
