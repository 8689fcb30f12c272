//! What this kernel has and does: nbd over generic netlink, loop, FUSE, mounts, namespaces. The only module with `unsafe` for system
//! calls.
