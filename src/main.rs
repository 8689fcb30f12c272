//! The program `socinbd`.

fn main() -> std::process::ExitCode {
    socinbd::cli::main(std::env::args_os())
}
