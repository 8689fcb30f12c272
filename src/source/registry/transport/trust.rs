//! TLS certificates: which are trusted, and error messages for those that are not.

use std::{collections::HashSet, fs, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
    sign::CertifiedKey,
};

use crate::{
    error::{Error, Kind, Result, ResultExt as _},
    oci::Digest,
    regular_file,
    source::hosts::host::{ClientCertificate, DatedFile, TlsFiles},
};

/// Where distributions keep the certificates of trusted CAs; the first file that exists is used.
const SYSTEM_CERTIFICATES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt", // Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/tls/certs/ca-bundle.crt",   // Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",             // openSUSE
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem", // Alpine
];

/// Size of a file of certificates, at most: the system's has a quarter of a megabyte.
const MAX_FILE: u64 = 8 << 20;

/// The trusted certificates.
struct Trusted {
    roots: RootCertStore,
    /// The digest of each of them: a server may present one of them as its own.
    whole: HashSet<Digest>,
}

impl Trusted {
    /// The system's CAs and those of the files named.
    fn read(extra: &[DatedFile]) -> Result<Self> {
        let mut trusted = Self {
            roots: RootCertStore::empty(),
            whole: HashSet::new(),
        };
        if let Some(system) = SYSTEM_CERTIFICATES
            .iter()
            .map(Path::new)
            .find(|path| path.exists())
        {
            let found = pem_certificates(system)?;
            trusted.whole.extend(found.iter().map(|it| Digest::of(it)));
            // one odd certificate of a system must not make all registries unreachable
            trusted.roots.add_parsable_certificates(found);
        }
        for DatedFile { path, .. } in extra {
            let found = pem_certificates(path)?;
            if found.is_empty() {
                return Err(Error::new(
                    Kind::InvalidArgument,
                    format!("{}: it has no PEM certificate", path.display()),
                ));
            }
            for certificate in found {
                trusted.whole.insert(Digest::of(&certificate));
                let added = trusted.roots.add(certificate);
                added.or_kind(Kind::InvalidArgument, || {
                    format!("{}: it has an invalid certificate", path.display())
                })?;
            }
        }
        if trusted.roots.is_empty() {
            return Err(Error::new(
                Kind::Io,
                "there are no CA certificates on this machine: install the package ca-certificates, or use --ca-cert",
            ));
        }
        Ok(trusted)
    }
}

/// A file of certificates or keys. Links are followed.
fn pem_file(path: &Path, what: &str) -> Result<Vec<u8>> {
    fs::canonicalize(path)
        .and_then(|path| regular_file::read(&path, MAX_FILE))
        .or_kind(Kind::Io, || format!("reading {what} of {}", path.display()))
}

fn pem_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = pem_file(path, "the certificates")?;
    CertificateDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<Vec<_>, _>>()
        .or_kind(Kind::InvalidArgument, || {
            format!("reading the certificates of {}", path.display())
        })
}

/// TLS with the system's CAs and the files of a host. Blocks.
pub(crate) fn configuration(files: &TlsFiles) -> Result<ClientConfig> {
    let context = || "setting up TLS".to_owned();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match files.skip_verify {
        true => Arc::new(NoVerifier(provider.signature_verification_algorithms)),
        false => {
            let Trusted { roots, whole } = Trusted::read(&files.ca)?;
            let usual =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                    .build()
                    .or_kind(Kind::Io, context)?;
            Arc::new(Verifier { usual, whole })
        }
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .or_kind(Kind::Io, context)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    if files.client.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let certificates = files.client.iter();
    let certificates = certificates
        .map(|files| client_certificate(files, &provider))
        .collect::<Result<_>>()?;
    Ok(builder.with_client_cert_resolver(Arc::new(ClientCertificates(certificates))))
}

/// The certificate with which a client shows who it is.
fn client_certificate(
    files: &ClientCertificate,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>> {
    let path = &files.certificate.path;
    let chain = pem_certificates(path)?;
    if chain.is_empty() {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{}: it has no PEM certificate", path.display()),
        ));
    }
    let key_path = files.key.as_ref().map_or(path, |key| &key.path);
    let bytes = pem_file(key_path, "the key")?;
    let invalid = || {
        format!(
            "{}: it has no PEM key for the certificate {}",
            key_path.display(),
            path.display()
        )
    };
    // what is wrong with it is not said: the text could have parts of the key
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|_| Error::new(Kind::InvalidArgument, invalid()))?;
    CertifiedKey::from_der(chain, key, provider)
        .map(Arc::new)
        .or_kind(Kind::InvalidArgument, invalid)
}

/// The client's certificates: the first that the server can verify is shown.
#[derive(Debug)]
struct ClientCertificates(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientCertificates {
    fn resolve(
        &self,
        _issuers: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let mut certificates = self.0.iter();
        certificates
            .find(|certificate| certificate.key.choose_scheme(schemes).is_some())
            .cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// For connections that never use TLS.
pub(super) fn no_configuration() -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .or_kind(Kind::Io, || "setting up TLS".to_owned())?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

/// The verifier of webpki, with one exception: a trusted certificate that a server presents as its own. `openssl req -x509` makes such
/// self-signed certificates; they are marked as CA certificates, which webpki does not accept from a server. Go does, and with it the other
/// clients of registries.
#[derive(Debug)]
struct Verifier {
    usual: Arc<WebPkiServerVerifier>,
    whole: HashSet<Digest>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // webpki has checked the period of validity before
            Err(error)
                if is_ca_certificate(&error) && self.whole.contains(&Digest::of(end_entity)) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// The verifier for `skip_verify`: any certificate is taken, if the server has its key.
#[derive(Debug)]
struct NoVerifier(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for NoVerifier {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

/// Whether the error is that a server presents a CA certificate. rustls has no value for it, and wraps the error of webpki.
fn is_ca_certificate(error: &rustls::Error) -> bool {
    let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = error else {
        return false;
    };
    other.0.to_string() == "CaUsedAsEndEntity"
}

/// The problem of a certificate, and what to do.
pub(super) fn hint(error: &CertificateError) -> &'static str {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet: is this machine's clock right?"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate is for other host names"
        }
        _ => {
            "its certificate is not trusted: if its CA is your own, give the CA certificate with --ca-cert"
        }
    }
}
