# bench.sh: what the benchmarks that start several daemons have in common. Sourced by them (bash).
#
#   stop VARIABLE         ends the process that it names, waits for it, and empties it
#   unmount_below DIR     takes down what is still mounted there: attachments, and what containerd 2 mounts in its own state

stop() {
  local pid=${!1}
  [ -z "$pid" ] || { kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; }
  printf -v "$1" ''
}

unmount_below() {
  awk -v below="$1/" 'index($5, below) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r umount -l
}
