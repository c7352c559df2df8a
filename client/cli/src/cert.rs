//! `holdfast cert`: a certificate for another client.

use crate::args::Cert;
use crate::init::write_new;
use crate::pki::{Authority, Identity, check_principal};
use anyhow::{Context, bail};

pub(crate) fn run(args: &Cert) -> anyhow::Result<()> {
    check_principal(&args.principal)?;
    let pki = args.dir.join("pki");
    let read = |name: &str| {
        let path = pki.join(name);
        std::fs::read_to_string(&path).with_context(|| {
            format!("cannot read {} (did `holdfast init` make this directory?)", path.display())
        })
    };
    let authority = Authority::load(&Identity { certificate: read("ca.pem")?, key: read("ca.key")? })?;
    let identity = authority.client(&args.principal)?;
    let (certificate, key) =
        (pki.join(format!("{}.pem", args.principal)), pki.join(format!("{}.key", args.principal)));
    if let Some(there) = [&certificate, &key].into_iter().find(|path| path.symlink_metadata().is_ok()) {
        bail!(
            "{} exists already, and nothing is overwritten; move it away to issue a new one",
            there.display()
        );
    }
    write_new(&certificate, &identity.certificate, 0o644)?;
    write_new(&key, &identity.key, 0o600)?;
    println!("made {} and {}", certificate.display(), key.display());
    println!();
    println!(
        "Give both files and {} to the client, and name them in its client.toml.",
        pki.join("ca.pem").display()
    );
    println!("Let it in: add to each volume it may use, in {}:", args.dir.join("control.toml").display());
    println!();
    println!("    [[volume.grant]]\n    principal = \"{}\"\n    access = \"read\"", args.principal);
    println!();
    println!("and restart the server.");
    Ok(())
}
