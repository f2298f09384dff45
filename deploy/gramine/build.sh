#!/usr/bin/env bash
# Build and sign the verifier's enclave. Needs Gramine (gramine-manifest, gramine-sgx-sign) and a signing key:
#   openssl genrsa -3 -out enclave-key.pem 3072
# Usage: build.sh BUNDLE ENCLAVE_KEY CLIENT_KEYS [OUTPUT]
#   CLIENT_KEYS  public keys of the clients that are answered, hex, separated by commas
set -euo pipefail

if [ "$#" -lt 3 ]; then
  sed -n '2,5p' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
bundle=$(realpath "$1")
key=$(realpath "$2")
clients=$3
output=$(realpath -m "${4:-enclave}")
version=${FIDES_VERSION:-0.1.0}
isvsvn=${ISVSVN:-1}

for tool in gramine-manifest gramine-sgx-sign gramine-sgx-sigstruct-view python3; do
  command -v "$tool" >/dev/null || { echo "build.sh: $tool is not installed" >&2; exit 1; }
done
[ -f "$bundle/fides.json" ] || { echo "build.sh: $bundle is not a bundle" >&2; exit 1; }
case $clients in
  *[!0-9a-f,]*) echo "build.sh: client keys are lower-case hexadecimal, separated by commas" >&2; exit 1 ;;
esac

mkdir -p "$output"
python3 -m venv --copies "$output/venv"
# Only wheels: building from source would run code that nobody has measured.
"$output/venv/bin/pip" install --quiet --only-binary :all: "fides-plugins[enclave]==$version"
# Byte code is compiled now, so that the enclave never writes any.
"$output/venv/bin/python" -m compileall -q "$output/venv/lib"
"$output/venv/bin/fides" inspect "$bundle" >/dev/null

python=$("$output/venv/bin/python" -c 'import sys; print(sys.executable)')
stdlib=$("$output/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
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
