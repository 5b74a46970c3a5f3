"""What a job key gives: mutual TLS 1.3 between the processes that have it, and a refusal for everybody else.

From the key comes an Ed25519 authority, the same in every process; with it each process issues a certificate to
itself. Nobody is asked, nothing is stored, and nothing of the system's trust store counts. Clocks of hosts differ, so
certificates are valid from 2020 to 2100: a job ends long before, and then its key is of no use.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from paceline.errors import HostError
from paceline.transport.keys import JobKey

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate, KeyUsage, Name

NAME = "paceline"  # the one name that a certificate of a job has, and that clients ask for
_FROM, _UNTIL = datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Credentials:
    """This process's own, made once: how it listens and how it connects."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @staticmethod
    def issue(key: JobKey) -> Credentials:
        """A fresh certificate under the job's authority; about 2 ms. Raises HostError without `cryptography`."""
        try:
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError as error:
            raise HostError(
                f"links between hosts need the package cryptography, which cannot be imported: {error}",
                fix="pip install cryptography",
            ) from None
        authority_key = Ed25519PrivateKey.from_private_bytes(key.derive("authority"))
        authority = _authority(authority_key, key)
        own_key = Ed25519PrivateKey.generate()
        own = _own(own_key, authority_key, authority)
        pem = own.public_bytes(serialization.Encoding.PEM) + own_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        trusted = authority.public_bytes(serialization.Encoding.DER)
        return Credentials(
            server=_context(ssl.PROTOCOL_TLS_SERVER, trusted, pem),
            client=_context(ssl.PROTOCOL_TLS_CLIENT, trusted, pem),
        )


def _context(side: int, trusted: bytes, pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.check_hostname = side == ssl.PROTOCOL_TLS_CLIENT
    if side == ssl.PROTOCOL_TLS_SERVER:
        # Tickets would lie unread in a connection that is only written to, and every connection is made whole anyway.
        context.num_tickets = 0
    context.load_verify_locations(cadata=trusted)
    # ssl takes a private key from a file only. This one has no name and is gone with its descriptor.
    fd = os.memfd_create("paceline-certificate", os.MFD_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _name(common: str) -> Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _authority(key: Ed25519PrivateKey, job_key: JobKey) -> Certificate:
    """Byte for byte the same in every process: Ed25519 signs the same bytes the same way."""
    from cryptography import x509

    name = _name(f"paceline job {job_key.fingerprint}")
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(job_key.derive("serial")[:8], "big") | 1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, None)
    )


def _own(key: Ed25519PrivateKey, authority_key: Ed25519PrivateKey, authority: Certificate) -> Certificate:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_name(NAME))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(above, critical=False)
        .sign(authority_key, None)
    )


def _usage(*, signs_certificates: bool) -> KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def in_words(error: ssl.SSLError) -> str:
    """Why TLS with a peer failed, for whoever has to mend it."""
    reason = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError) or reason == "CERTIFICATE_VERIFY_FAILED":
        return "its certificate is not of this job's key: it has another job key, or another job's"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "it hung up in the midst of TLS"
    return _WORDS.get(reason) or f"TLS failed: {reason.replace('_', ' ').lower() or error}"


_WORDS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate: it has no job key",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate, and got none: this process has no job key",
    "TLSV1_ALERT_UNKNOWN_CA": "it refused this process's certificate: it has another job key",
    "TLSV1_ALERT_DECRYPT_ERROR": "it refused this process's certificate: it has another job key",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refused this process's certificate: it has another job key",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refused this process's certificate: it has another job key",
    "HTTP_REQUEST": "it speaks HTTP: this is not a port for a browser",
    "HTTPS_PROXY_REQUEST": "it speaks HTTP: this is not a port for a browser",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: it runs with --insecure, or is not paceline",
    "UNSUPPORTED_PROTOCOL": "it speaks a version of TLS before 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks a version of TLS before 1.3",
}
