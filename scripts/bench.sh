# bench.sh: what the benchmarks that start several daemons have in common. Sourced by them (bash).
#
#   stop VARIABLE         ends the process that it names, waits for it, and empties it
#   unmount_below DIR     takes down what is still mounted there: attachments, and what containerd 2 mounts in its own state
#   containerd_config DIR SOCKET   the configuration of a containerd 2 in DIR without CRI, whose snapshotter `soci` is at SOCKET
#   cri_config DIR SOCKET NAME SANDBOX   the same with CRI, whose snapshotter is NAME, and SANDBOX the image of its pods
#   until_there PID COMMAND...     waits until COMMAND succeeds, while the process lives

stop() {
  local pid=${!1}
  [ -z "$pid" ] || { kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; }
  printf -v "$1" ''
}

unmount_below() {
  awk -v below="$1/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r umount -l
}

containerd_config() {
  cat <<TOML
version = 3
root = "$1/root"
state = "$1/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt"]
[grpc]
  address = "$1/socket"
[proxy_plugins.soci]
  type = "snapshot"
  address = "$2"
[proxy_plugins.soci.exports]
  enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "soci"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
TOML
}

cri_config() {
  containerd_config "$1" "$2" | sed '/^disabled_plugins/d'
  # two containerds must not share the socket of NRI, and there are no network plugins: pods use the network of this machine
  cat <<TOML
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "$3"
  disable_snapshot_annotations = false
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "$4"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  conf_dir = "$1/no-network-plugins"
TOML
}

until_there() {
  local pid=$1
  shift
  until "$@" >/dev/null 2>&1; do kill -0 "$pid"; sleep 0.02; done
}
