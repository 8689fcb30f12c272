# packages.sh: how this machine reaches its distribution's packages, for mmdebstrap, which asks nobody. Sourced by scripts (bash).
#
#   package_sources CODENAME   prints which file names this distribution's own package sources, whatever else the machine has
#   package_access FILE        writes how apt fetches here (proxies and the like), as settings of apt

package_sources() {
  local file
  for file in /etc/apt/sources.list.d/{debian,ubuntu}.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.{sources,list}; do
    if [ -e "$file" ] && grep -q "^[^#]*$1" "$file"; then echo "$file"; return; fi
  done
  echo "packages: no file below /etc/apt names package sources for $1" >&2
  return 1
}

package_access() {
  apt-config dump | grep '^Acquire::' >"$1"
}
