#!/usr/bin/env bash
# docker/unpack_debian_packages.sh FOLDER PACKAGE...
# Unpack packages of Debian 13 into FOLDER on an older Debian, from the mirror that apt uses.
# The machine's own package lists and packages do not change.
set -euo pipefail
folder=$(realpath -m "$1")
shift
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial"
# shellcheck disable=SC2016 # apt's own placeholder
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -1)
[ -n "$mirror" ] || { echo "no mirror of Debian in apt's sources" >&2; exit 1; }
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] $mirror trixie main" >"$folder/apt/trixie.list"
options=(
  -qq
  -o "Dir::Etc::sourcelist=$folder/apt/trixie.list" -o Dir::Etc::sourceparts=-
  -o "Dir::State::lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt/cache"
  -o APT::Sandbox::User=root
)
apt-get "${options[@]}" update
cd "$folder/apt"
apt-get "${options[@]}" download "$@"
for package in *.deb; do dpkg -x "$package" "$folder"; done
rm -r "$folder/apt"
