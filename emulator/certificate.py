"""The emulator's TLS certificate: created at startup, deleted at shutdown.

Its certificate authority (CA) signs nothing else: the CA's private key is discarded, so whoever trusts the CA trusts
this emulator only. The certificate's private key is in a file only while it is loaded.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import certifi

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import CertificateBuilder, GeneralName, KeyUsage

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# aiohttp (by OpenSSL's defaults) and httpx read the first; requests reads the second, or else CURL_CA_BUNDLE.
_CA_VARIABLES = {"SSL_CERT_FILE": ["SSL_CERT_FILE"], "REQUESTS_CA_BUNDLE": ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]}
# A client whose clock is slow must not reject it as not yet valid.
_CLOCK_TOLERANCE = timedelta(hours=1)
_VALIDITY = timedelta(days=365)


class Certificate:
    """A certificate for the loopback addresses and other hosts, with its files in a private temporary directory.

    Args:
        hosts: host names and IP addresses.
        environment: variables that workers inherit; the CA bundles that they name stay trusted.
    """

    def __init__(self, hosts: Iterable[str], environment: Mapping[str, str]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="emulator-")
        directory = Path(self._directory.name)
        authority, certificate, key = _create(list(dict.fromkeys([*LOOPBACK, *hosts])))
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(authority)
        self.context = _server_context(directory, certificate, key)
        self.environment: dict[str, str] = {}
        """Variables that make a process trust the emulator, in addition to the CAs that it would trust without them."""
        for name, names_read in _CA_VARIABLES.items():
            bundle = directory / f"{name}.pem"
            inherited = (Path(environment[one]) for one in names_read if environment.get(one))
            trusted = next((path for path in inherited if path.is_file()), Path(certifi.where()))
            bundle.write_bytes(trusted.read_bytes() + b"\n" + authority)
            self.environment[name] = str(bundle)

    def remove(self) -> None:
        """Delete the files."""
        self._directory.cleanup()


def _create(hosts: list[str]) -> tuple[bytes, bytes, bytes]:
    """Return a CA, a certificate for these hosts that it has signed, and the certificate's private key, all in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    authority = (
        _builder("Emulator CA", ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign"), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, SHA256())
    )
    certificate = (
        _builder("Emulator", key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(map(_alternative_name, hosts)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return authority.public_bytes(Encoding.PEM), certificate.public_bytes(Encoding.PEM), private


def _builder(subject: str, key: EllipticCurvePrivateKey) -> CertificateBuilder:
    from cryptography import x509

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    valid_from = datetime.now(UTC) - _CLOCK_TOLERANCE
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name("Emulator CA"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid_from)
        .not_valid_after(valid_from + _VALIDITY)
    )


def _key_usage(allowed: str) -> KeyUsage:
    from cryptography import x509

    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: name == allowed for name in names})


def _alternative_name(host: str) -> GeneralName:
    from cryptography import x509

    with suppress(ValueError):
        return x509.IPAddress(ip_address(host))
    return x509.DNSName(host)


def _server_context(directory: Path, certificate: bytes, key: bytes) -> ssl.SSLContext:
    """Return the server's TLS context. OpenSSL reads a key only from a file, which is deleted right after."""
    chain, private = directory / "certificate.pem", directory / "key.pem"
    chain.write_bytes(certificate)
    try:
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, private)
    finally:
        private.unlink(missing_ok=True)
    return context
