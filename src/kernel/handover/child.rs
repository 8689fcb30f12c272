//! Starts a program that inherits descriptors.

use std::{
    ffi::{CString, OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::{Child, Command},
    ptr,
};

use super::FIRST;
use crate::{kernel::session, open_files};

/// Digits of a process's number, at most.
const DIGITS: usize = 10;

/// A program that is started, and what it is given.
pub struct Program<'a> {
    /// Its file.
    pub file: &'a Path,
    /// Its arguments; the first is its name.
    pub arguments: &'a [OsString],
    /// Its whole environment, without `LISTEN_PID`.
    pub environment: &'a [(OsString, OsString)],
    /// What it inherits as `LISTEN_FDS`, from number 3 on, besides the standard streams.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// Starts a program. Its environment has `LISTEN_PID`, its own number, which only the new process itself can know: between fork and exec.
pub fn spawn(program: &Program<'_>) -> io::Result<Child> {
    let count = RawFd::try_from(program.descriptors.len());
    let end = FIRST + count.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // the descriptors of the start itself come to stand above
    let _taken = take_numbers(end)?;
    let mut image = Image::new(program, end)?;
    let mut command = Command::new(program.file);
    // SAFETY: between fork and exec the closure makes system calls and writes into memory that was allocated before, and nothing else.
    unsafe {
        command.pre_exec(move || image.exec());
    }
    command.spawn()
}

/// Takes all free numbers of descriptors below `end`.
fn take_numbers(end: RawFd) -> io::Result<Vec<OwnedFd>> {
    let nothing = File::open("/dev/null")?;
    let mut taken = Vec::new();
    loop {
        let next = rustix::io::fcntl_dupfd_cloexec(&nothing, FIRST)?;
        if next.as_raw_fd() >= end {
            return Ok(taken);
        }
        taken.push(next);
    }
}

/// What execve(2) needs.
struct Image {
    file: CString,
    /// `LISTEN_PID=`, a number and an end.
    listen_pid: Vec<u8>,
    /// What the pointers lead to.
    _strings: Vec<CString>,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    descriptors: Vec<RawFd>,
    /// The first number above those that are handed over.
    end: RawFd,
}

// SAFETY: the pointers lead to memory that the value itself owns, and that is written by `exec` alone, which has the value for itself.
unsafe impl Send for Image {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl Sync for Image {}

impl Image {
    fn new(program: &Program<'_>, end: RawFd) -> io::Result<Self> {
        let string = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::from);
        let mut strings = Vec::new();
        for argument in program.arguments {
            strings.push(string(argument.as_bytes().to_vec())?);
        }
        let arguments = strings.len();
        for (name, value) in program.environment {
            let pair = [name.as_os_str(), value].join(OsStr::new("="));
            strings.push(string(pair.into_vec())?);
        }
        let mut listen_pid = b"LISTEN_PID=".to_vec();
        listen_pid.resize(listen_pid.len() + DIGITS + 1, 0);
        let pointers: Vec<_> = strings.iter().map(|string| string.as_ptr()).collect();
        let (arguments, environment) = pointers.split_at(arguments);
        let end_of_list = [ptr::null()];
        Ok(Self {
            file: string(program.file.as_os_str().as_bytes().to_vec())?,
            arguments: [arguments, &end_of_list].concat(),
            environment: [environment, &[listen_pid.as_ptr().cast()], &end_of_list].concat(),
            listen_pid,
            _strings: strings,
            descriptors: program
                .descriptors
                .iter()
                .map(|it| it.as_raw_fd())
                .collect(),
            end,
        })
    }

    /// Becomes the program; returns only with an error.
    fn exec(&mut self) -> io::Result<()> {
        // out of the way of each other first
        for number in &mut self.descriptors {
            // SAFETY: a system call on numbers.
            *number = unsafe { libc::fcntl(*number, libc::F_DUPFD_CLOEXEC, self.end) };
            if *number < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (number, place) in self.descriptors.iter().zip(FIRST..) {
            // SAFETY: a system call on numbers. What stands at the place is not used in this process any more.
            if unsafe { libc::dup2(*number, place) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        open_files::give_back(None);
        session::unblock_signals();
        let digits = self.listen_pid.len() - DIGITS - 1;
        write_number(std::process::id(), &mut self.listen_pid[digits..]);
        // SAFETY: the strings end with a zero byte and the lists with a null pointer; `self` owns them all.
        unsafe {
            libc::execve(
                self.file.as_ptr(),
                self.arguments.as_ptr(),
                self.environment.as_ptr(),
            );
        }
        Err(io::Error::last_os_error())
    }
}

/// Writes a number and a zero byte.
fn write_number(number: u32, place: &mut [u8]) {
    let digits = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = number;
    for digit in place[..digits].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    place[digits] = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_processes_are_written() {
        for number in [1, 9, 10, 4_194_304, u32::MAX] {
            let mut place = [0xff; DIGITS + 1];
            write_number(number, &mut place);
            let text = number.to_string();
            assert_eq!(&place[..=text.len()], [text.as_bytes(), b"\0"].concat());
        }
    }
}
