//! The file system: names, files of 4 KiB blocks, and the true history of every change, which no real file system tells.
//!
//! ```text
//!  name ─► node ─► blocks, size, times (seen)      history: who changed it, when, and whether its evidence shows it
//!                  └─ durable copy, as of the last sync
//! ```

use crate::rng::Rng;
use holdfast_shared::state::FileIdentity;
use holdfast_shared::types::{Evidence, FileTime, OpenId};
use holdfast_shared::wire::control::{Attributes, FileKind};
use holdfast_shared::wire::link::LinkBinding;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks that a file may have.
pub(crate) const BLOCKS: u64 = 4;
/// The wall clock at the world's beginning, nanoseconds since 1970.
pub(crate) const EPOCH_NS: u64 = 1_700_000_000_000_000_000;

/// One file, whatever its name; never used twice.
pub(crate) type Node = u64;

/// Who changed a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Actor {
    /// A binding's write.
    Binding(OpenId, LinkBinding),
    /// A change of size through an open at control.
    Open(OpenId),
    /// A change of size at control by name, or by an open that replaces the content.
    Control,
    /// Through an open of which it is not known yet which.
    Unknown,
    /// Somebody beside the server.
    Outside,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) by: Actor,
    /// True if the file's evidence is not what it was.
    pub(crate) shows: bool,
    /// True if a power cut has undone it, and its traces with it.
    pub(crate) undone: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Content {
    /// Block to tag and the number of the change that wrote it.
    blocks: BTreeMap<u64, (u64, usize)>,
    evidence: Evidence,
}

#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) identity: FileIdentity,
    seen: Content,
    durable: Content,
    /// How many changes there were at the last sync.
    synced: usize,
    pub(crate) history: Vec<Change>,
    /// The change by which each tag first landed.
    landed: BTreeMap<u64, usize>,
    links: u32,
    holders: u32,
}

#[derive(Debug)]
pub(crate) struct Files {
    names: BTreeMap<String, Node>,
    nodes: BTreeMap<Node, File>,
    last: Node,
    /// Granularity of the times that files carry, nanoseconds.
    tick: u64,
}

impl Files {
    pub(crate) fn new(tick: u64) -> Self {
        Self { names: BTreeMap::new(), nodes: BTreeMap::new(), last: 0, tick: tick.max(1) }
    }

    /// The time that a change made now gets.
    fn stamp(&self, now: u64) -> i64 {
        let wall = EPOCH_NS + now;
        i64::try_from(wall - wall % self.tick).unwrap_or(i64::MAX)
    }

    pub(crate) fn lookup(&self, name: &str) -> Option<Node> {
        self.names.get(name).copied()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = (&String, &Node)> {
        self.names.iter()
    }

    pub(crate) fn get(&self, node: Node) -> Option<&File> {
        self.nodes.get(&node)
    }

    /// The node with this identity, if it is still there.
    pub(crate) fn identified(&self, identity: FileIdentity) -> Option<Node> {
        self.nodes.iter().find(|(_, file)| file.identity == identity).map(|(node, _)| *node)
    }

    pub(crate) fn create(&mut self, now: u64, name: &str) -> Node {
        self.last += 1;
        // Inode numbers are used again; the generation tells their uses apart.
        let used: BTreeSet<u64> = self.nodes.values().map(|file| file.identity.inode).collect();
        let inode = (1..).find(|inode| !used.contains(inode)).unwrap_or(0);
        let stamp = self.stamp(now);
        let evidence = Evidence { changed_ns: stamp, modified_ns: stamp, size: 0 };
        let content = Content { blocks: BTreeMap::new(), evidence };
        let file = File {
            identity: FileIdentity { device: 1, inode, generation: self.last },
            seen: content.clone(),
            durable: content,
            synced: 0,
            history: Vec::new(),
            landed: BTreeMap::new(),
            links: 1,
            holders: 0,
        };
        self.nodes.insert(self.last, file);
        self.names.insert(name.to_owned(), self.last);
        self.last
    }

    pub(crate) fn hold(&mut self, node: Node) {
        if let Some(file) = self.nodes.get_mut(&node) {
            file.holders += 1;
        }
    }

    pub(crate) fn let_go(&mut self, node: Node) {
        if let Some(file) = self.nodes.get_mut(&node) {
            file.holders = file.holders.saturating_sub(1);
        }
        self.sweep(node);
    }

    fn sweep(&mut self, node: Node) {
        if self.nodes.get(&node).is_some_and(|file| file.links == 0 && file.holders == 0) {
            self.nodes.remove(&node);
        }
    }

    pub(crate) fn unlink(&mut self, now: u64, name: &str) {
        if let Some(node) = self.names.remove(name) {
            let stamp = self.stamp(now);
            if let Some(file) = self.nodes.get_mut(&node) {
                file.links = file.links.saturating_sub(1);
                file.seen.evidence.changed_ns = stamp;
            }
            self.sweep(node);
        }
    }

    pub(crate) fn rename(&mut self, now: u64, from: &str, to: &str) {
        if let Some(node) = self.names.remove(from) {
            self.unlink(now, to);
            let stamp = self.stamp(now);
            if let Some(file) = self.nodes.get_mut(&node) {
                file.seen.evidence.changed_ns = stamp;
            }
            self.names.insert(to.to_owned(), node);
        }
    }

    /// Changes a file's content; true if it is there.
    fn change(&mut self, now: u64, node: Node, by: Actor, act: impl FnOnce(&mut Content, usize)) -> bool {
        let stamp = self.stamp(now);
        let Some(file) = self.nodes.get_mut(&node) else { return false };
        let before = file.seen.evidence;
        act(&mut file.seen, file.history.len());
        file.seen.evidence.changed_ns = file.seen.evidence.changed_ns.max(stamp);
        if file.seen.evidence.modified_ns <= before.modified_ns {
            file.seen.evidence.modified_ns = file.seen.evidence.modified_ns.max(stamp);
        }
        let shows = file.seen.evidence != before;
        file.history.push(Change { by, shows, undone: false });
        true
    }

    pub(crate) fn write(&mut self, now: u64, node: Node, by: Actor, block: u64, tag: u64) -> bool {
        let number = self.changes(node);
        if let Some(file) = self.nodes.get_mut(&node) {
            file.landed.entry(tag).or_insert(number);
        }
        self.change(now, node, by, |content, number| {
            content.blocks.insert(block, (tag, number));
            content.evidence.size = content.evidence.size.max((block + 1) * BLOCK);
        })
    }

    pub(crate) fn resize(&mut self, now: u64, node: Node, by: Actor, size: u64) -> bool {
        self.change(now, node, by, |content, number| {
            let cut = size.div_ceil(BLOCK)..BLOCKS;
            content.blocks.extend(cut.map(|block| (block, (0, number))));
            content.evidence.size = size;
        })
    }

    /// A writer beside the server that hides its traces as well as one can: it sets the time of modification back.
    pub(crate) fn write_outside(&mut self, now: u64, node: Node, block: u64, tag: u64) {
        let stamp = self.stamp(now);
        if let Some(file) = self.nodes.get_mut(&node) {
            let before = file.seen.evidence;
            let number = file.history.len();
            file.seen.blocks.insert(block, (tag, number));
            file.seen.evidence.size = before.size.max((block + 1) * BLOCK);
            file.seen.evidence.changed_ns = before.changed_ns.max(stamp);
            let shows = file.seen.evidence != before;
            file.history.push(Change { by: Actor::Outside, shows, undone: false });
        }
    }

    pub(crate) fn read(&self, node: Node, block: u64) -> u64 {
        self.nodes.get(&node).and_then(|file| file.seen.blocks.get(&block)).map_or(0, |(tag, _)| *tag)
    }

    pub(crate) fn sync(&mut self, node: Node) {
        if let Some(file) = self.nodes.get_mut(&node) {
            file.durable = file.seen.clone();
            file.synced = file.history.len();
        }
    }

    /// True if what is durable of a block is this tag, or was written after it.
    pub(crate) fn is_durable(&self, node: Node, block: u64, tag: u64) -> bool {
        self.nodes.get(&node).is_none_or(|file| {
            let durable = file.durable.blocks.get(&block);
            let number = file.landed.get(&tag).copied().unwrap_or(0);
            durable.is_some_and(|(there, since)| *there == tag || *since >= number)
                || file.durable.evidence.size <= block * BLOCK
        })
    }

    /// How many changes a file has seen.
    pub(crate) fn changes(&self, node: Node) -> usize {
        self.nodes.get(&node).map_or(0, |file| file.history.len())
    }

    /// The machine loses its power: of each block that was not synced, the old or the new is there. The times are as
    /// late as any content that is there, or, if `torn`, either.
    pub(crate) fn power_cut(&mut self, rng: &mut Rng, torn: bool) {
        for file in self.nodes.values_mut() {
            file.holders = 0;
            let mut after = file.durable.clone();
            let mut new = false;
            for block in 0..BLOCKS {
                if file.seen.blocks.get(&block) != file.durable.blocks.get(&block) && rng.once_in(2) {
                    new = true;
                    match file.seen.blocks.get(&block) {
                        Some(content) => after.blocks.insert(block, *content),
                        None => after.blocks.remove(&block),
                    };
                }
            }
            if (new && !torn) || rng.once_in(2) {
                after.evidence = file.seen.evidence;
            } else {
                file.history.iter_mut().skip(file.synced).for_each(|change| change.undone = !new);
            }
            file.synced = file.history.len();
            file.seen.clone_from(&after);
            file.durable = after;
        }
        self.nodes.retain(|_, file| file.links > 0);
    }
}

impl File {
    pub(crate) fn evidence(&self) -> Evidence {
        self.seen.evidence
    }

    pub(crate) fn attributes(&self) -> Attributes {
        let time = |ns: i64| FileTime {
            seconds: ns.div_euclid(1_000_000_000),
            nanos: u32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0),
        };
        let Evidence { changed_ns, modified_ns, size } = self.seen.evidence;
        Attributes {
            kind: FileKind::File,
            size,
            allocated: size,
            mode: 0o600,
            inode: self.identity.inode,
            links: u64::from(self.links),
            accessed: time(modified_ns),
            modified: time(modified_ns),
            changed: time(changed_ns),
            uid: 0,
            gid: 0,
        }
    }

    /// The kernel's own name of the file.
    pub(crate) fn handle(&self) -> Vec<u8> {
        [self.identity.inode.to_le_bytes(), self.identity.generation.to_le_bytes()].concat()
    }
}
