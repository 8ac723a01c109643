#!/usr/bin/env bash
# bash cmake/install_packages.sh GROUP|PACKAGE…: installs what is missing, on Debian and Ubuntu. Groups:
#   build  what the library, the examples and the trainer need
#   test   build, and what tests/run.sh needs
# Without root or sudo it names the packages and fails.
set -euo pipefail

packages=()
for name in "$@"; do
  case $name in
    test) packages+=(catch2 libbenchmark-dev pkg-config libopenblas-dev clang libclang-rt-dev libomp-dev clang-format) ;;&
    build | test) packages+=(g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev) ;;
    *) packages+=("$name") ;;
  esac
done

if ! command -v dpkg-query apt-get >/dev/null; then
  echo "install_packages: no apt here; please install what these Debian packages hold: ${packages[*]}" >&2
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} == 0 ]] && exit 0

as_root=()
if [[ $(id -u) != 0 ]]; then
  if ! command -v sudo >/dev/null || ! { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; then
    echo "install_packages: neither root nor sudo; please have installed: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "install_packages: ${missing[*]}"
"${as_root[@]}" apt-get update -q
# Where clang brings its sanitizers with it there is no package of that name.
apt-cache show libclang-rt-dev >/dev/null 2>&1 || missing=("${missing[@]/libclang-rt-dev/}")
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends ${missing[*]}
