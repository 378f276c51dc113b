#!/bin/sh
# Assembles the small guests into Multiboot 1 images (ELF32).
#
#   guests/small/build.sh OUTPUT_DIR [NAME...]
#
# Without names, every *.S beside this script is built. ASFLAGS goes to the assembler, as
# in ASFLAGS="--defsym ROUNDS=1000" for cross_mod. Needs GNU as, ld and objcopy.
# The sources hold 16-, 32- and 64-bit code, so they are assembled and linked as
# 64-bit objects below 4 GiB and then rewritten as the ELF32 that Multiboot asks for.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh OUTPUT_DIR [NAME...]}
shift
mkdir -p "$out"
if [ $# -eq 0 ]; then
    for source in "$here"/*.S; do
        name=${source##*/}
        set -- "$@" "${name%.S}"
    done
fi
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
for name in "$@"; do
    # shellcheck disable=SC2086
    as --64 --fatal-warnings ${ASFLAGS:-} -I "$here" "$here/$name.S" -o "$work/$name.o"
    ld -m elf_x86_64 -n --no-warn-rwx-segments -T "$here/link.ld" "$work/$name.o" -o "$work/$name.64"
    objcopy -O elf32-i386 "$work/$name.64" "$work/$name.elf"
    mv "$work/$name.elf" "$out/$name.elf"
done
