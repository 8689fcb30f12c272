//! The wire structures and constants of the NBD protocol, under the names of the specification (doc/proto.md of the NetworkBlockDevice
//! project, <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>). All numbers are big-endian on the wire.
//!
//! Pure: structures are views of bytes; nothing here reads or writes a socket. [`options`] parses the data that a client sends with an
//! option.

#![warn(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        reason = "a test may fail"
    )
)]

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

pub mod options;

// ---- Handshake: newstyle negotiation

/// ASCII `NBDMAGIC`: the first eight bytes that a server sends.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// ASCII `IHAVEOPT`: marks newstyle in the greeting, and starts every option of the client.
pub const NBD_OPTS_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts every reply to an option.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flag: the server supports fixed newstyle.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

/// Client flag: the client supports fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: the server must leave out the 124 zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Zeroes after an [`ExportNameReply`], unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Bytes that a string (export name, message, query) may have ("Conventions").
pub const MAX_STRING: usize = 4096;

/// The first message of the server.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`NBD_MAGIC`].
    pub magic: U64,
    /// [`NBD_OPTS_MAGIC`].
    pub option_magic: U64,
    /// `NBD_FLAG_*` of the handshake.
    pub handshake_flags: U16,
}
const _: () = assert!(size_of::<Greeting>() == 18);

/// The client's answer to the greeting.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ClientFlags {
    /// `NBD_FLAG_C_*`.
    pub flags: U32,
}
const _: () = assert!(size_of::<ClientFlags>() == 4);

/// Starts an option; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`NBD_OPTS_MAGIC`].
    pub magic: U64,
    /// `NBD_OPT_*`.
    pub option: U32,
    /// Bytes of data.
    pub length: U32,
}
const _: () = assert!(size_of::<OptionHeader>() == 16);

/// Starts a reply to an option; `length` bytes of data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OptionReply {
    /// [`NBD_REP_MAGIC`].
    pub magic: U64,
    /// The option that this reply is for.
    pub option: U32,
    /// `NBD_REP_*`.
    pub reply_type: U32,
    /// Bytes of data.
    pub length: U32,
}
const _: () = assert!(size_of::<OptionReply>() == 20);

/// The reply to `NBD_OPT_EXPORT_NAME`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExportNameReply {
    /// Bytes of the export.
    pub size: U64,
    /// `NBD_FLAG_*` of the transmission.
    pub transmission_flags: U16,
}
const _: () = assert!(size_of::<ExportNameReply>() == 10);

/// Data of `NBD_REP_INFO` for `NBD_INFO_EXPORT`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoExport {
    /// [`NBD_INFO_EXPORT`].
    pub info_type: U16,
    /// Bytes of the export.
    pub size: U64,
    /// `NBD_FLAG_*` of the transmission.
    pub transmission_flags: U16,
}
const _: () = assert!(size_of::<InfoExport>() == 12);

/// Data of `NBD_REP_INFO` for `NBD_INFO_BLOCK_SIZE`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InfoBlockSize {
    /// [`NBD_INFO_BLOCK_SIZE`].
    pub info_type: U16,
    /// Bytes that every offset and length is a multiple of.
    pub minimum: U32,
    /// Bytes of a request that needs no more work than it must.
    pub preferred: U32,
    /// Most bytes of a payload.
    pub maximum_payload: U32,
}
const _: () = assert!(size_of::<InfoBlockSize>() == 14);

/// Choose an export and go to the transmission, without errors.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// End the negotiation.
pub const NBD_OPT_ABORT: u32 = 2;
/// List the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Go over to TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Ask about an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Choose an export and go to the transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Agree on structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// List the metadata contexts of an export.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Choose the metadata contexts of an export.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Agree on 64-bit lengths (experimental).
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Bit 31: the reply is an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Done.
pub const NBD_REP_ACK: u32 = 1;
/// One export of the list.
pub const NBD_REP_SERVER: u32 = 2;
/// Something about an export.
pub const NBD_REP_INFO: u32 = 3;
/// One metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// The option is unknown here.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
/// Known, valid, and forbidden.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
/// The option's data makes no sense.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
/// The export does not exist.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
/// The server is stopping.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR | 7;
/// The request or its reply is too large.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR | 9;

/// Size and transmission flags: always sent.
pub const NBD_INFO_EXPORT: u16 = 0;
/// The canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// A line for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// The size constraints.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// The one metadata context that the specification defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

// ---- Transmission

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes fail.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` works.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` works.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: `NBD_CMD_TRIM` works.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` works.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` works. Only with structured replies.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: several connections see the same.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` works.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;

/// Starts a request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts one part of a structured reply.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Read.
pub const NBD_CMD_READ: u16 = 0;
/// Write; the data follows the request.
pub const NBD_CMD_WRITE: u16 = 1;
/// End of the session; has no reply.
pub const NBD_CMD_DISC: u16 = 2;
/// Make written data durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// A range that is not needed any more.
pub const NBD_CMD_TRIM: u16 = 4;
/// A hint: this range will be read.
pub const NBD_CMD_CACHE: u16 = 5;
/// Write zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Ask for the metadata of a range.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag of writes: reply when it is on the disk.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of `NBD_CMD_READ`: at most one content part in the reply.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of `NBD_CMD_BLOCK_STATUS`: exactly one extent.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;

/// Flag of a structured reply: its last part.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;

/// Nothing but the flag.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Data at an offset.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Zeroes at an offset.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Extents of one metadata context.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// An error.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) | 1;

/// Flag of `base:allocation`: not allocated.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Flag of `base:allocation`: reads as zero.
pub const NBD_STATE_ZERO: u32 = 1 << 1;

/// Operation not permitted.
pub const NBD_EPERM: u32 = 1;
/// Input/output error.
pub const NBD_EIO: u32 = 5;
/// Cannot allocate memory.
pub const NBD_ENOMEM: u32 = 12;
/// Invalid argument.
pub const NBD_EINVAL: u32 = 22;
/// No space left on device.
pub const NBD_ENOSPC: u32 = 28;
/// Value too large.
pub const NBD_EOVERFLOW: u32 = 75;
/// Operation not supported.
pub const NBD_ENOTSUP: u32 = 95;
/// Server is in the process of being shut down.
pub const NBD_ESHUTDOWN: u32 = 108;

/// A request. With `NBD_CMD_WRITE`, `length` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    /// [`NBD_REQUEST_MAGIC`].
    pub magic: U32,
    /// `NBD_CMD_FLAG_*`.
    pub flags: U16,
    /// `NBD_CMD_*`.
    pub command: U16,
    /// The client's name for the request; the reply bears the same.
    pub cookie: U64,
    /// Where the range starts.
    pub offset: U64,
    /// Bytes of the range.
    pub length: U32,
}
const _: () = assert!(size_of::<Request>() == 28);

/// A simple reply. To a read without error, the data follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`NBD_SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// Zero or an error value.
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}
const _: () = assert!(size_of::<SimpleReply>() == 16);

/// Starts one part of a structured reply; `length` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct StructuredReply {
    /// [`NBD_STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// `NBD_REPLY_FLAG_*`.
    pub flags: U16,
    /// `NBD_REPLY_TYPE_*`.
    pub reply_type: U16,
    /// The request's.
    pub cookie: U64,
    /// Bytes that follow.
    pub length: U32,
}
const _: () = assert!(size_of::<StructuredReply>() == 20);

/// The payload of `NBD_REPLY_TYPE_OFFSET_HOLE`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OffsetHole {
    /// Where the zeroes start.
    pub offset: U64,
    /// How many there are; not none.
    pub hole_size: U32,
}
const _: () = assert!(size_of::<OffsetHole>() == 12);

/// One extent of `NBD_REPLY_TYPE_BLOCK_STATUS`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct BlockDescriptor {
    /// Bytes of the extent; not zero.
    pub length: U32,
    /// `NBD_STATE_*`.
    pub status_flags: U32,
}
const _: () = assert!(size_of::<BlockDescriptor>() == 8);

/// The payload of `NBD_REPLY_TYPE_ERROR`; a message comes after it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ErrorPayload {
    /// An error value; not zero.
    pub error: U32,
    /// Bytes of the message.
    pub message_length: U16,
}
const _: () = assert!(size_of::<ErrorPayload>() == 6);
