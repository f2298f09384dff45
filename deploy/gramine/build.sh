#!/usr/bin/env bash
# Build and sign the verifier's enclave. Needs Gramine (gramine-manifest, gramine-sgx-sign) and a signing key:
#   openssl genrsa -3 -out enclave-key.pem 3072
# Usage: build.sh BUNDLE ENCLAVE_KEY CLIENT_KEYS [OUTPUT]
#   CLIENT_KEYS  public keys of the clients that are answered, hex, separated by commas
# The package is the one beside this script; what it needs comes from requirements.lock. Two builds in equal
# containers, at the same path, have the same MRENCLAVE.
set -euo pipefail

if [ "$#" -lt 3 ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
bundle=$(realpath "$1")
key=$(realpath "$2")
clients=$3
output=$(realpath -m "${4:-enclave}")
isvsvn=${ISVSVN:-1}

for tool in gramine-manifest gramine-sgx-sign gramine-sgx-sigstruct-view python3; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is not installed" >&2; exit 1; }
done
[ -f "$bundle/fides.json" ] || { echo "build.sh: $bundle is not a bundle" >&2; exit 1; }
case $clients in
  *[!0-9a-f,]*) echo "build.sh: client keys are lower-case hexadecimal, separated by commas" >&2; exit 1 ;;
esac

rm -rf "$output/venv"
mkdir -p "$output"
python3 -m venv --copies "$output/venv"
python=$output/venv/bin/python
# Only wheels, and only those whose hashes are known: building from source would run code that nobody has measured.
"$python" -m pip install --quiet --no-compile --no-deps --only-binary :all: --require-hashes -r "$here/requirements.lock"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -R "$here/../../fides_plugins" "$site/"
# The installer is not needed inside, and its byte code differs from build to build.
rm -rf "$site"/pip "$site"/pip-* "$site"/setuptools "$site"/setuptools-* "$site"/pkg_resources \
  "$site"/_distutils_hack "$site"/distutils-precedence.pth "$output"/venv/bin/pip*
find "$output/venv" -depth -name __pycache__ -exec rm -rf {} +
# Byte code is compiled now, so that the enclave never writes any; without times in it, so that it is always the same.
PYTHONHASHSEED=0 "$python" -m compileall -q --invalidation-mode unchecked-hash "$site"
"$python" -I -m fides_plugins.cli inspect "$bundle" >/dev/null

stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
arch=$(gcc -dumpmachine 2>/dev/null || echo x86_64-linux-gnu)
gramine-manifest \
  -Dpython="$python" -Dprefix="$output/venv" -Dstdlib="$stdlib" -Darch_libdir="/lib/$arch" \
  -Dbundle="$bundle" -Dclients="$clients" -Disvsvn="$isvsvn" \
  "$here/fides-verifier.manifest.template" "$output/fides-verifier.manifest"
gramine-sgx-sign --key "$key" --manifest "$output/fides-verifier.manifest" \
  --output "$output/fides-verifier.manifest.sgx"
# mr_enclave goes into the clients' policies.
gramine-sgx-sigstruct-view "$output/fides-verifier.sig"
echo "start it with: cd $output && gramine-sgx fides-verifier"
