#!/bin/sh
# Fetches real protein sequences, 20,000 of UniProt, from Debian's package mmseqs2-examples; takes the folder to put them in.
set -eu
folder=$1
if [ -s "$folder/DB.fasta.gz" ]; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "no apt-get and dpkg-deb here to fetch mmseqs2-examples with; put a FASTA file at $folder/DB.fasta.gz" >&2
    exit 1
fi
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download -q mmseqs2-examples >&2)
dpkg-deb -x "$work"/mmseqs2-examples_*.deb "$work/unpacked"
cp "$work/unpacked/usr/share/doc/mmseqs2/example-data/DB.fasta.gz" "$folder/"
