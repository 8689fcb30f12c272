# oci-layout.sh: makes an OCI layout with tar, sha256sum and the usual compressors. Sourced by the scripts that make images (bash).
#
#   layout_start LAYOUT WORK             begins a layout; it appears in place when it is whole. WORK is a folder for what is in between
#   layer NAME PACKING TAR-ARGUMENT...   packs a layer in the background: gzip, pigz, members, zstd or plain
#   layout_end CONFIG                    waits for the layers, and ends it. CONFIG is the configuration's "config", as JSON

layout_start() {
  layout=$1 layout_work=$2 layer_names=() layer_jobs=()
  rm -rf "$layout.new"
  mkdir -p "$layout.new/blobs/sha256" "$layout_work"
}

# Standard input packed. `pigz` is one member made of many blocks, `members` several gzip files put together.
pack() {
  case $1 in
    gzip) gzip -6 -n ;;
    pigz) pigz -6 -n -b 64 -p 4 ;;
    members) split -b 3M --filter 'gzip -6 -n' ;;
    zstd) zstd -q -3 -c ;;
    plain) cat ;;
    *) echo "oci-layout: no packing $1" >&2; return 2 ;;
  esac
}

layer() {
  local name=$1 packing=$2 type=application/vnd.oci.image.layer.v1.tar; shift 2
  case $packing in gzip | pigz | members) type+=+gzip ;; zstd) type+=+zstd ;; esac
  layer_names+=("$name")
  (
    set -euo pipefail
    cd "$layout_work"
    { tar --numeric-owner --sort=name "$@" | tee /dev/fd/3 | pack "$packing" >"$name.blob"; } 3>&1 >/dev/null |
      sha256sum | cut -d' ' -f1 >"$name.diff_id"
    blob "$name.blob" "$type" >"$name.descriptor"
  ) &
  layer_jobs+=($!)
}

# blob FILE MEDIA-TYPE: moves a file into the layout, and prints its descriptor
blob() {
  local digest size
  digest=$(sha256sum <"$1" | cut -d' ' -f1) size=$(stat -c %s "$1")
  mv "$1" "$layout.new/blobs/sha256/$digest"
  printf '{"mediaType":"%s","digest":"sha256:%s","size":%s}' "$2" "$digest" "$size"
}

layout_end() {
  local job name layers=() diff_ids=() config manifest
  for job in "${layer_jobs[@]}"; do wait "$job" || { echo "oci-layout: a layer of $layout could not be packed" >&2; return 1; }; done
  for name in "${layer_names[@]}"; do
    layers+=("$(cat "$layout_work/$name.descriptor")")
    diff_ids+=("\"sha256:$(cat "$layout_work/$name.diff_id")\"")
  done
  local IFS=,
  printf '{"architecture":"%s","os":"linux","config":%s,"rootfs":{"type":"layers","diff_ids":[%s]}}' \
    "$(dpkg --print-architecture)" "$1" "${diff_ids[*]}" >"$layout_work/config"
  config=$(blob "$layout_work/config" application/vnd.oci.image.config.v1+json)
  printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
    "$config" "${layers[*]}" >"$layout_work/manifest"
  manifest=$(blob "$layout_work/manifest" application/vnd.oci.image.manifest.v1+json)
  printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[%s]}' \
    "${manifest%\}},\"annotations\":{\"org.opencontainers.image.ref.name\":\"latest\"}}" >"$layout.new/index.json"
  printf '{"imageLayoutVersion":"1.0.0"}' >"$layout.new/oci-layout"
  rm -rf "$layout"
  mv "$layout.new" "$layout"
}
