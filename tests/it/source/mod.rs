//! References, registries and their failures.
