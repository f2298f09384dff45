"""What evidence is good enough. Closed on empty: a policy that names nothing trusts nothing.

Every relaxation is a field of its own with a default that refuses, so that the policy itself shows everything
that was given up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fides_plugins.errors import SettingsError
from fides_plugins.settings import read_toml


def _hexadecimal(value: str) -> str:
    bytes.fromhex(value)  # ValueError becomes pydantic's message
    return value.lower().replace(" ", "")


Hex = Annotated[str, AfterValidator(_hexadecimal)]
TcbStatus = Literal[
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
]

#: Registers that must be pinned. TDX: MRTD is the firmware alone, RTMR1 to 3 hold kernel and userland.
_PINNED = {
    "sgx": (("mrenclave",), ("mrsigner", "isv_prod_id", "minimum_isv_svn")),
    "tdx": (("mrtd", "rtmr1", "rtmr2", "rtmr3"),),
    "sev-snp": (("measurement",),),
}


class _PolicyPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measurement(_PolicyPart):
    """One program that is trusted, by what its TEE measured. Every value given must match."""

    tee: Literal["sgx", "tdx", "sev-snp"]
    mrenclave: Hex | None = None
    mrsigner: Hex | None = None
    isv_prod_id: int | None = None
    minimum_isv_svn: int | None = None
    mrtd: Hex | None = None
    rtmr0: Hex | None = None
    rtmr1: Hex | None = None
    rtmr2: Hex | None = None
    rtmr3: Hex | None = None
    mrconfigid: Hex | None = None
    mrowner: Hex | None = None
    measurement: Hex | None = None
    host_data: Hex | None = None

    @model_validator(mode="after")
    def _complete(self) -> Measurement:
        choices = _PINNED[self.tee]
        if not any(all(getattr(self, name) is not None for name in names) for names in choices):
            wanted = " or ".join(", ".join(names) for names in choices)
            raise ValueError(f"a measurement of {self.tee} must give {wanted}")
        return self

    def matches(self, tee: str, measured: dict[str, str]) -> bool:
        """Whether a report's registers (hexadecimal; the security version decimal) are this program's."""
        if tee != self.tee:
            return False
        for name, wanted in self.model_dump(exclude={"tee"}, exclude_none=True).items():
            if name == "minimum_isv_svn":
                if int(measured.get("isv_svn", "-1")) < wanted:
                    return False
            elif measured.get(name) != str(wanted):
                return False
        return True


class SnpTcb(_PolicyPart):
    """Security patch levels of an AMD platform; each must be reached."""

    bootloader: int = Field(ge=0, le=255)
    tee: int = Field(ge=0, le=255)
    snp: int = Field(ge=0, le=255)
    microcode: int = Field(ge=0, le=255)


class ModelRule(_PolicyPart):
    """The bundles that may answer for one model; more than one while a new bundle replaces an old one."""

    bundle_digests: tuple[Hex, ...] = Field(min_length=1, description="SHA-256 of the manifests that are trusted.")
    minimum_bundle_version: int = Field(0, ge=0, description="Older bundles are refused.")


class ClientSetRule(_PolicyPart):
    """The set of clients that a verifier must answer, and no others, by who signs it."""

    id: str
    operator: Hex
    minimum_serial: int = Field(0, ge=0)


class EvidencePolicy(_PolicyPart):
    """What a client demands of a verifier's evidence."""

    measurements: tuple[Measurement, ...] = Field((), description="Programs that are trusted; none: nothing is.")
    models: dict[str, ModelRule] = Field({}, description="Models by name, with the bundles that are trusted for each.")
    maximum_age_s: float = Field(86_400.0, gt=0, description="Seconds after which evidence must be fetched again.")
    clients: tuple[Hex, ...] = Field(
        (), description="The verifier must answer these clients (Ed25519 public keys) and no others."
    )
    client_set: ClientSetRule | None = Field(None, description="In place of `clients`: a set that an operator signs.")
    minimum_tcb_evaluation: int = Field(0, ge=0, description="Lowest TCB evaluation data number (Intel).")
    rejected_advisories: tuple[str, ...] = Field((), description="Intel advisories that must not apply.")
    snp_minimum_tcb: SnpTcb | None = Field(None, description="Lowest patch levels (AMD); needed for SEV-SNP.")
    report_data: Hex | None = Field(None, description="Expected report data of a bare report, 64 bytes.")
    # Relaxations.
    allowed_tcb_status: tuple[TcbStatus, ...] = Field((), description="TCB states accepted besides UpToDate (Intel).")
    out_of_date_grace_days: int = Field(
        0, ge=0, description="Age up to which an allowed OutOfDate firmware level is accepted (Intel)."
    )
    allow_dynamic_platform: bool = Field(False, description="Accept servers whose CPUs can change (cloud TDX).")
    allow_cached_keys: bool = Field(False, description="Accept platforms that cache keys (cloud TDX).")
    allow_unpinned_rtmr0: bool = Field(False, description="Accept any configuration of a virtual machine (TDX).")
    allow_zero_registers: bool = Field(False, description="Accept registers that nothing was measured into.")
    allow_smt: bool = Field(False, description="Accept hyperthreading.")
    allow_snp_debug: bool = Field(False, description="Accept SEV-SNP guests that the host can read.")
    allow_snp_migration: bool = Field(False, description="Accept SEV-SNP guests with a migration agent.")
    allow_any_client: bool = Field(
        False, description="Accept a verifier that may answer anybody, so that the host can ask it for references."
    )
    allow_unbound_report_data: bool = Field(False, description="Accept a bare report that vouches for no key.")

    @model_validator(mode="after")
    def _one_kind_of_clients(self) -> EvidencePolicy:
        if self.clients and self.client_set is not None:
            raise ValueError("clients and client_set exclude each other")
        return self

    @classmethod
    def from_toml(cls, path: str | Path) -> EvidencePolicy:
        """A policy from a TOML file: its table `evidence` if there is one, else its top level.

        Raises
        ------
        SettingsError
            If the file cannot be read or names something unknown.
        """
        data: dict[str, Any] = read_toml(path)
        try:
            return cls.model_validate(data.get("evidence", data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "policy"
            raise SettingsError(
                f"The evidence policy is wrong at `{where}`: {first['msg']}.",
                "docs/reference/evidence-policy.md lists what a policy holds.",
            ) from None

    def relaxations(self) -> tuple[str, ...]:
        """Names of everything this policy gives up, for people to read."""
        names = [n for n in type(self).model_fields if n.startswith("allow_") and getattr(self, n)]
        if self.out_of_date_grace_days:
            names.append(f"out_of_date_grace_days:{self.out_of_date_grace_days}")
        return (*names, *(f"allowed_tcb_status:{s}" for s in self.allowed_tcb_status))
