//! The program `socinbd`.

fn main() {}
