//! A program in an image's root. (Stub.)
pub struct Container {
    pub root: std::os::fd::OwnedFd,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub hostname: String,
}
pub fn run(_c: Container) -> crate::error::Result<u8> {
    unimplemented!()
}
pub fn own_session(_c: &mut std::process::Command) {}
