"""What the verifier in the enclave and the client must agree on.

Formats and checks shared by `fides_plugins.enclave` (which makes them) and `fides_plugins.client` (which
checks them): signed requests and receipts, the sealing of references, and attestation evidence with the
policy that decides about it. Nothing here does I/O.
"""
