//! One 512-byte header block: V7, ustar, star and GNU layouts, read as Go's `archive/tar` reads them (AWS's tool sees layers that way).

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::number;

/// Everything in a tar is padded to this.
pub(super) const BLOCK_SIZE: usize = 512;
/// The same, for offsets.
pub(super) const BLOCK: u64 = 512;

/// A header block or a block of zeros, as it stands in the stream.
pub(super) type RawBlock = [u8; BLOCK_SIZE];

/// POSIX.1-1988 `ustar`; V7 is its first 257 bytes. Offsets and names are those of `pax(1)`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Ustar {
    name: [u8; 100],
    mode: [u8; 8],
    uid: [u8; 8],
    gid: [u8; 8],
    size: [u8; 12],
    mtime: [u8; 12],
    chksum: [u8; 8],
    typeflag: u8,
    linkname: [u8; 100],
    magic: [u8; 6],
    version: [u8; 2],
    uname: [u8; 32],
    gname: [u8; 32],
    devmajor: [u8; 8],
    devminor: [u8; 8],
    prefix: [u8; 155],
    _padding: [u8; 12],
}

/// What star puts behind `devminor`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Star {
    _ustar: [u8; 345],
    prefix: [u8; 131],
    atime: [u8; 12],
    ctime: [u8; 12],
    _padding: [u8; 8],
    trailer: [u8; 4],
}

/// What GNU tar puts behind `devminor`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Gnu {
    _ustar: [u8; 345],
    atime: [u8; 12],
    ctime: [u8; 12],
    _offset: [u8; 12],
    _longnames: [u8; 4],
    _unused: u8,
    sparse: [SparseField; 4],
    isextended: u8,
    realsize: [u8; 12],
    _padding: [u8; 17],
}

/// The block that continues a GNU sparse map.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GnuExtension {
    sparse: [SparseField; 21],
    isextended: u8,
    _padding: [u8; 7],
}

/// `struct sparse` of GNU tar: octal or base-256 numbers.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SparseField {
    offset: [u8; 12],
    numbytes: [u8; 12],
}

/// What the magic says of the bytes behind the V7 fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header block's fields, before any PAX record or GNU long name is applied.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) typeflag: u8,
    pub(super) name: Vec<u8>,
    pub(super) linkname: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: i64,
    pub(super) uname: Vec<u8>,
    pub(super) gname: Vec<u8>,
    pub(super) devmajor: i64,
    pub(super) devminor: i64,
}

/// Why a block is no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadBlock {
    /// Its checksum is not that of its bytes.
    Checksum,
    /// This field is no number.
    Number(&'static str),
}

impl Header {
    /// Reads a block that is not all zero.
    pub(super) fn parse(block: &RawBlock) -> Result<Self, BadBlock> {
        let ustar: &Ustar = zerocopy::transmute_ref!(block);
        let stored = number::octal(&ustar.chksum).ok_or(BadBlock::Checksum)?;
        if !checksums(block).contains(&stored) {
            return Err(BadBlock::Checksum);
        }
        let mut header = Self {
            typeflag: ustar.typeflag,
            name: number::string(&ustar.name).to_vec(),
            linkname: number::string(&ustar.linkname).to_vec(),
            size: numeric(&ustar.size, "size")?,
            mode: numeric(&ustar.mode, "mode")?,
            uid: numeric(&ustar.uid, "uid")?,
            gid: numeric(&ustar.gid, "gid")?,
            mtime: numeric(&ustar.mtime, "mtime")?,
            uname: Vec::new(),
            gname: Vec::new(),
            devmajor: 0,
            devminor: 0,
        };
        let layout = layout(block);
        if layout != Layout::V7 {
            header.uname = number::string(&ustar.uname).to_vec();
            header.gname = number::string(&ustar.gname).to_vec();
            header.devmajor = numeric(&ustar.devmajor, "devmajor")?;
            header.devminor = numeric(&ustar.devminor, "devminor")?;
            let prefix = prefix(layout, block)?;
            if !prefix.is_empty() {
                header.name = [prefix, &header.name].join(&b'/');
            }
        }
        Ok(header)
    }
}

fn numeric(field: &[u8], name: &'static str) -> Result<i64, BadBlock> {
    number::numeric(field).ok_or(BadBlock::Number(name))
}

/// The sum of all bytes with the checksum field as blanks: of unsigned bytes as POSIX wants it, and of signed ones as old tars did.
fn checksums(block: &RawBlock) -> [i64; 2] {
    let ustar: &Ustar = zerocopy::transmute_ref!(block);
    let ([all, all_high], [own, own_high]) = (sums(block), sums(&ustar.chksum));
    let blanks = i64::from(b' ').wrapping_mul(8);
    let unsigned = all.wrapping_sub(own).wrapping_add(blanks);
    // a byte from 128 on is less by 256 if it is signed
    let high = all_high.wrapping_sub(own_high);
    [unsigned, unsigned.wrapping_sub(high.wrapping_mul(256))]
}

/// The sum of bytes, and how many are 128 or more. A block cannot overflow them.
fn sums(bytes: &[u8]) -> [i64; 2] {
    let (mut all, mut high) = (0_i64, 0_i64);
    for byte in bytes {
        all = all.wrapping_add(i64::from(*byte));
        high = high.wrapping_add(i64::from(*byte >> 7));
    }
    [all, high]
}

fn layout(block: &RawBlock) -> Layout {
    let ustar: &Ustar = zerocopy::transmute_ref!(block);
    let star: &Star = zerocopy::transmute_ref!(block);
    match (&ustar.magic, &ustar.version) {
        (b"ustar\0", _) if &star.trailer == b"tar\0" => Layout::Star,
        (b"ustar\0", _) => Layout::Ustar,
        (b"ustar ", b" \0") => Layout::Gnu,
        _ => Layout::V7,
    }
}

/// The directory part of a long name.
fn prefix(layout: Layout, block: &RawBlock) -> Result<&[u8], BadBlock> {
    let ustar: &Ustar = zerocopy::transmute_ref!(block);
    match layout {
        Layout::V7 => Ok(&[]),
        Layout::Ustar => Ok(number::string(&ustar.prefix)),
        Layout::Star => {
            let star: &Star = zerocopy::transmute_ref!(block);
            numeric(&star.atime, "atime")?;
            numeric(&star.ctime, "ctime")?;
            Ok(number::string(&star.prefix))
        }
        Layout::Gnu => {
            let gnu: &Gnu = zerocopy::transmute_ref!(block);
            let is_time = |field: &[u8; 12]| field[0] == 0 || number::numeric(field).is_some();
            if is_time(&gnu.atime) && is_time(&gnu.ctime) {
                return Ok(&[]);
            }
            // before 1.8 Go wrote a ustar prefix into GNU headers, over the times; Go still reads it back
            let prefix = number::string(&ustar.prefix);
            Ok(if prefix.is_ascii() { prefix } else { &[] })
        }
    }
}

/// A GNU sparse file's real size and its map's first fields, out of a header of type `S`; `None` where the block is not GNU's.
pub(super) fn gnu_sparse(block: &RawBlock) -> Option<Result<(i64, SparseFields<'_>), BadBlock>> {
    if layout(block) != Layout::Gnu {
        return None;
    }
    let gnu: &Gnu = zerocopy::transmute_ref!(block);
    Some(numeric(&gnu.realsize, "realsize").map(|size| {
        let fields = SparseFields {
            fields: &gnu.sparse,
            continues: gnu.isextended != 0,
        };
        (size, fields)
    }))
}

/// The fields of a block that continues a GNU sparse map.
pub(super) fn gnu_sparse_extension(block: &RawBlock) -> SparseFields<'_> {
    let extension: &GnuExtension = zerocopy::transmute_ref!(block);
    SparseFields {
        fields: &extension.sparse,
        continues: extension.isextended != 0,
    }
}

/// Part of a GNU sparse map.
pub(super) struct SparseFields<'a> {
    fields: &'a [SparseField],
    /// Whether another block of the map follows.
    pub(super) continues: bool,
}

impl SparseFields<'_> {
    /// Offsets and lengths, up to the first empty field.
    pub(super) fn pairs(&self) -> impl Iterator<Item = Result<(i64, i64), BadBlock>> {
        self.fields
            .iter()
            .take_while(|field| field.offset[0] != 0)
            .map(|field| {
                Ok((
                    numeric(&field.offset, "sparse offset")?,
                    numeric(&field.numbytes, "sparse length")?,
                ))
            })
    }
}
