#!/usr/bin/env python3
"""Makes this folder from the whole set of vectors: select.py WHOLE_SET HERE.

What is left out are layers and zTOCs of which another one is the same case: further levels and makers of plain gzip streams, further
span sizes, and the one large layer. All that is odd stays, and so do all images and all accept cases.
"""

import json
import pathlib
import shutil
import sys

LAYERS = {
    "gz-large", "gz-gnu-1", "gz-gnu-9", "gz-go-huffman", "gz-klauspost-1", "gz-klauspost-9", "gz-pigz-independent", "gz-rle",
    "gz-mem1", "gz-header-go", "gz-members-2-trailer-chunk-span", "gz-members-stored-mix", "gz-block-flush", "gz-partial-flush",
    "gz-incompressible", "gz-huffman-only", "gz-go-default", "gz-members-headers",
    "gz-pigz-b32", "gz-mem9-win9", "gz-sync-flush", "gz-klauspost-default",
}
ZTOCS = {
    "gz-gnu-6.262144", "gz-gnu-6.4194304", "gz-zeros.4194304",
    "gz-members-2.131072", "gz-members-50.4194304",
}


def main(whole: pathlib.Path, here: pathlib.Path) -> None:
    index = json.loads((whole / "index.json").read_text())
    index["layers"] = [layer for layer in index["layers"] if layer["id"] not in LAYERS]
    files = set()
    for layer in index["layers"]:
        layer["ztocs"] = [z for z in layer["ztocs"] if pathlib.Path(z.get("file", "-")).name.removesuffix(".ztoc") not in ZTOCS]
        files.update(part[key] for part in [layer, *layer["ztocs"]] for key in ("file", "expected", "dump") if key in part)
    for base in index["accepts"]["bases"].values():
        files.update(base[key] for key in ("layer", "ztoc", "dump"))
    files.update(case["file"] for case in index["accepts"]["cases"] if "file" in case)
    files.update(str(path.relative_to(whole)) for path in (whole / "images").rglob("*") if path.is_file())
    # a dump may leave its list of files to another one
    for dump in [name for name in files if name.startswith("ztoc/") and name.endswith(".json")]:
        other = json.loads((whole / dump).read_text()).get("files_same_as")
        files.update([other if "/" in other else f"ztoc/{other}"] if other else [])

    for folder in ("layers", "expected", "ztoc", "accepts", "images"):
        shutil.rmtree(here / folder, ignore_errors=True)
    for name in sorted(files):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(whole / name, here / name)
    (here / "index.json").write_text(dump_index(index))
    print(len(files), "files,", sum(path.stat().st_size for path in here.rglob("*") if path.is_file()), "bytes with what stands here")


def dump_index(index: dict) -> str:
    """One case a line, so that changes can be read."""
    def lines(items: list) -> str:
        return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"

    accepts = index["accepts"]
    return (
        f'{{\n"format": {index["format"]},\n"producer": {json.dumps(index["producer"])},\n'
        f'"layers": {lines(index["layers"])},\n"images": {lines(index["images"])},\n'
        f'"accepts": {{"bases": {json.dumps(accepts["bases"])}, "cases": {lines(accepts["cases"])}}}\n}}\n'
    )


main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
