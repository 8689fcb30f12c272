//! Prints the OpenAPI document of the daemon's API: `cargo run --example openapi > docs/openapi.json`.

fn main() -> serde_json::Result<()> {
    let document = socinbd::api::openapi::document();
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}
