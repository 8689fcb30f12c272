//! What this machine offers. (Stub.)
#[derive(serde::Serialize)]
pub struct Finding {
    pub name: String,
    pub available: bool,
    pub detail: String,
}
#[derive(serde::Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
}
pub fn probe() -> Report {
    Report { findings: vec![] }
}
