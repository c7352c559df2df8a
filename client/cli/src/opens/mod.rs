//! `holdfast opens`, `holdfast sessions`: what the server's operator sees of them, and how an open is ended by force.
//!
//! ```text
//!   select    an id from its first digits, filters          table    how it is shown
//!   close     force-closes, and waits until it is gone
//! ```

mod close;
pub(crate) mod select;
mod table;

use crate::admin::{Admin, directory};
use crate::args::{Connection, Opens, Sessions};
use crate::output::line;

pub(crate) async fn run(connection: &Connection, args: &Opens) -> anyhow::Result<()> {
    let directory = directory(args.dir.as_deref(), connection.config.as_deref())?;
    let mut admin = Admin::connect(&directory).await?;
    if !args.close.is_empty() {
        return close::run(&mut admin, args).await;
    }
    if let Some(prefix) = &args.open {
        let open = prefix.find(&mut admin).await?;
        return if args.json { line(open) } else { table::whole(&open) };
    }
    let mut list = table::List::new(args.json, table::OPENS);
    admin.all("opens", |open| if select::wanted(args, &open) { list.row(&open) } else { Ok(()) }).await?;
    list.end("no open")
}

pub(crate) async fn sessions(connection: &Connection, args: &Sessions) -> anyhow::Result<()> {
    let directory = directory(args.dir.as_deref(), connection.config.as_deref())?;
    let mut admin = Admin::connect(&directory).await?;
    let mut list = table::List::new(args.json, table::SESSIONS);
    admin.all("sessions", |session| list.row(&session)).await?;
    list.end("no session")
}
