//! The private CA and the certificates it signs.

use anyhow::{Context, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use std::time::SystemTime;

const CA_NAME: &str = "Holdfast private CA";
/// Years until a certificate ends. A private CA has nobody to renew it in time.
const YEARS: u64 = 10;

/// A certificate and its key, both PEM. No Debug: it holds a secret.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A CA that can sign.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new one, and what is to be stored of it.
    pub(crate) fn new() -> anyhow::Result<(Self, Identity)> {
        let key = new_key()?;
        let certificate = ca_params()?.self_signed(&key)?.pem();
        let identity = Identity { certificate, key: key.serialize_pem() };
        Ok((Self { issuer: Issuer::new(ca_params()?, key) }, identity))
    }

    /// Takes up one that [`Authority::new`] made.
    pub(crate) fn load(stored: &Identity) -> anyhow::Result<Self> {
        let key = KeyPair::from_pem(&stored.key).context("the CA's key cannot be read")?;
        // What this signs names CA_NAME and this key as its issuer: both must be those of the stored certificate.
        let again = ca_params()?.self_signed(&key)?;
        if subject_key(&again.pem()) != subject_key(&stored.certificate) {
            bail!(
                "ca.pem and ca.key were not made by `holdfast init`; sign the client's certificate with your own tools"
            );
        }
        Ok(Self { issuer: Issuer::new(ca_params()?, key) })
    }

    /// A server's certificate for these names (DNS names and IP addresses).
    pub(crate) fn server(&self, names: Vec<String>) -> anyhow::Result<Identity> {
        self.sign("holdfast server", names, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A client's certificate; the principal is both the only SAN and the CN.
    pub(crate) fn client(&self, principal: &str) -> anyhow::Result<Identity> {
        check_principal(principal)?;
        self.sign(principal, vec![principal.to_owned()], ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(
        &self,
        name: &str,
        names: Vec<String>,
        usage: ExtendedKeyUsagePurpose,
    ) -> anyhow::Result<Identity> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = common_name(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        params.not_after = rcgen::date_time_ymd(year_of_end(), 1, 1);
        let key = new_key()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

/// A principal must be fit for a DNS-type SAN, a config file and a file name.
pub(crate) fn check_principal(name: &str) -> anyhow::Result<()> {
    let fits = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !fits {
        bail!(
            "'{name}' cannot be a principal: letters, digits, '.', '-' and '_', at most 64, beginning with a letter or digit"
        );
    }
    Ok(())
}

fn new_key() -> anyhow::Result<KeyPair> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn ca_params() -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    params.distinguished_name = common_name(CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_after = rcgen::date_time_ymd(year_of_end(), 1, 1);
    Ok(params)
}

fn year_of_end() -> i32 {
    const SECONDS_PER_YEAR: u64 = 31_556_952;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    i32::try_from(1970 + now / SECONDS_PER_YEAR + YEARS).unwrap_or(2100)
}

/// The subject key of a PEM certificate of ours: the bytes from the P-256 point on, found by its fixed prefix.
fn subject_key(pem: &str) -> Option<Vec<u8>> {
    use holdfast_client::pem::{CertificateDer, PemObject};
    // SubjectPublicKeyInfo of P-256: BIT STRING of 66 bytes, no unused bits, uncompressed point.
    const PREFIX: [u8; 4] = [0x03, 0x42, 0x00, 0x04];
    const NAME: &[u8] = CA_NAME.as_bytes();
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    certificate.windows(NAME.len()).position(|w| w == NAME)?;
    let at = certificate.windows(PREFIX.len()).position(|w| w == PREFIX)?;
    certificate.get(at..at + 68).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_authority_signs_again_and_a_foreign_key_is_noticed() {
        let (_, stored) = Authority::new().unwrap();
        let again = Authority::load(&stored).unwrap();
        assert!(again.client("backup").unwrap().certificate.contains("BEGIN CERTIFICATE"));
        let (_, other) = Authority::new().unwrap();
        let mixed = Identity { certificate: stored.certificate.clone(), key: other.key };
        assert!(Authority::load(&mixed).is_err());
    }

    #[test]
    fn principals_are_checked() {
        for good in ["client", "db-1.example", "a_b"] {
            check_principal(good).unwrap();
        }
        for bad in ["", "-x", "a b", "a/b", "ä", "x\"y", &"x".repeat(65)] {
            assert!(check_principal(bad).is_err(), "{bad}");
        }
    }
}
