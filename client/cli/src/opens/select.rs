//! Which opens are meant: an id or the first digits of one, and filters.

use crate::admin::Admin;
use crate::args::Opens;
use anyhow::{Context, bail};
use serde_json::Value;

/// Digits of an id.
const DIGITS: usize = 32;

/// The id of an open, or its first digits; lower case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Prefix(String);

impl std::str::FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() <= DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
        if text.is_empty() || !digits {
            return Err(format!("an open's id is {DIGITS} hexadecimal digits; its first few will do"));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl Prefix {
    /// The greatest id below all that begin so: what a page is asked for behind of. `None` if there is none.
    fn before(&self) -> Option<String> {
        let least = u128::from_str_radix(&format!("{:0<DIGITS$}", self.0), 16).ok()?;
        least.checked_sub(1).map(|id| format!("{id:0DIGITS$x}"))
    }

    /// The one open whose id begins so, if there is one.
    pub(super) async fn find_any(&self, admin: &mut Admin) -> anyhow::Result<Option<Value>> {
        let (page, _) = admin.page("opens", self.before().as_deref(), 2).await?;
        let mut found = page.into_iter().filter(|open| id(open).starts_with(&self.0));
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => bail!("several opens' ids begin with {}; give more digits", self.0),
            (one, _) => Ok(one),
        }
    }

    /// The one open whose id begins so.
    pub(super) async fn find(&self, admin: &mut Admin) -> anyhow::Result<Value> {
        self.find_any(admin)
            .await?
            .with_context(|| format!("there is no open {} (any more); `holdfast opens` lists them", self.0))
    }
}

/// An open's id.
pub(super) fn id(open: &Value) -> &str {
    open["open"].as_str().unwrap_or_default()
}

/// True if the filters let the open through.
pub(super) fn wanted(args: &Opens, open: &Value) -> bool {
    let is = |field: &str, wanted: &Option<String>| wanted.as_ref().is_none_or(|w| open[field] == w.as_str());
    is("principal", &args.principal)
        && is("volume", &args.volume)
        && args.state.is_none_or(|state| open["state"] == state.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn opens(text: &str) -> Opens {
        let Ok(crate::args::Cli { command: crate::args::Command::Opens(opens), .. }) =
            clap::Parser::try_parse_from(text.split(' '))
        else {
            panic!("{text}")
        };
        opens
    }

    #[test]
    fn a_prefix_is_hexadecimal_digits() {
        assert_eq!("3Fa".parse::<Prefix>().unwrap(), Prefix("3fa".into()));
        for wrong in ["", "xyz", "0x12", &"0".repeat(33), "ä"] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_asked_for_begins_just_before_the_prefix() {
        let before = |text: &str| text.parse::<Prefix>().unwrap().before();
        assert_eq!(before("1").unwrap(), format!("0{}", "f".repeat(31)));
        assert_eq!(before("00ff").unwrap(), format!("00fe{}", "f".repeat(28)));
        assert_eq!(before(&"f".repeat(32)).unwrap(), format!("{}e", "f".repeat(31)));
        assert_eq!(before("0"), None);
    }

    #[test]
    fn filters_all_have_to_fit() {
        let open = json!({ "open": "1", "principal": "a", "volume": "v", "state": "detached" });
        for (options, through) in [
            ("", true),
            (" --principal a", true),
            (" --principal a --state detached --volume v", true),
            (" --volume w", false),
            (" --principal a --state active", false),
        ] {
            assert_eq!(wanted(&opens(&format!("holdfast opens{options}")), &open), through, "{options}");
        }
    }
}
