//! Attach, detach, restore: the way of control, readable from top to bottom.

pub mod image;

pub use image::Image;
