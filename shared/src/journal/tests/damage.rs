//! Damage is named, and told from a write that was cut short.

use super::*;
use crate::journal::layout::{FRAME_HEAD_BYTES, HEADER_BYTES, Header, SegmentKind, file_name};

#[test]
fn crs_08_every_bit_of_a_record_that_others_follow_is_watched() {
    let (disk, mut model, _journal) = filled(6);
    let second = HEADER_BYTES as u64 + FRAME;
    for bit in second * 8..(second + FRAME) * 8 {
        disk.flip(&file_name(1), bit);
        let error = model.recover(&disk).unwrap_err();
        assert!(
            matches!(&error, RecoverError::Corrupt { file, offset, .. } if *file == file_name(1) && *offset == second),
            "{error}"
        );
        disk.flip(&file_name(1), bit);
    }
    let text = {
        disk.flip(&file_name(1), second * 8);
        model.recover(&disk).unwrap_err().to_string()
    };
    assert!(text.contains("journal-0000000000000001.log is damaged at byte 208"), "{text}");
    assert!(text.contains("Restore the journal directory"), "{text}");
}

#[test]
fn a_torn_last_write_is_cut_and_reported() {
    let (disk, mut model, _journal) = filled(6);
    let last = HEADER_BYTES as u64 + 5 * FRAME;
    disk.flip(&file_name(1), (last + FRAME_HEAD_BYTES as u64 + 3) * 8);
    let recovery = model.recover(&disk).unwrap();
    assert_eq!(recovery.summary().last_sequence, 5);
    let cut = recovery.summary().cut.clone().unwrap();
    assert_eq!((cut.file, cut.offset), (file_name(1), last));
    assert!(cut.bytes > 100 && cut.bytes <= FRAME, "{}", cut.bytes);
    // Cut for good: the next start finds a whole file.
    drop(recovery.start(2, options()).unwrap());
    let again = model.recover(&disk).unwrap();
    assert_eq!((again.summary().cut.clone(), again.summary().last_sequence), (None, 5));
    assert_eq!(again.summary().generation, 2);
}

#[test]
fn crs_08_missing_files_and_foreign_files_stop_the_start() {
    let (disk, mut model, journal) = filled(3);
    drop(journal);
    for value in 0..2 {
        let mut journal = open(&mut model, &disk);
        model.append(&mut journal, 2, value, 0).unwrap();
        journal.commit().unwrap();
    }
    assert_eq!(disk.list().unwrap().len(), 3);
    let second = disk.bytes(&file_name(2)).unwrap();
    disk.lose(&file_name(2));
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("journal-0000000000000002.log, is missing"), "{error}");
    disk.put(&file_name(2), &second);
    model.recover(&disk).unwrap();
    // Its last record, and with it all that proves that there was one, is lost.
    let record = second.iter().rposition(|byte| *byte != 0).unwrap();
    let mut shorter = second.clone();
    shorter[HEADER_BYTES..=record].fill(0);
    disk.put(&file_name(2), &shorter);
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("begins with record 5, the file before it ends with 3"), "{error}");
    disk.put(&file_name(2), &second);
    disk.lose(&file_name(1));
    let error = model.recover(&disk).unwrap_err().to_string();
    assert!(error.contains("files before it are missing"), "{error}");
    let foreign = recover(disk, ClusterId([8; 16]), &mut |_| Ok(())).unwrap_err();
    assert_eq!(foreign, RecoverError::Foreign { file: file_name(2) });
}

#[test]
fn crs_08_other_formats_are_refused_with_words() {
    for (version, words) in [(0_u16, "no longer reads"), (2, "Start the newer release")] {
        let (disk, mut model, _journal) = filled(1);
        let mut bytes = disk.bytes(&file_name(1)).unwrap();
        bytes[4..6].copy_from_slice(&version.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        disk.put(&file_name(1), &bytes);
        let error = model.recover(&disk).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_record_that_is_not_understood_is_named() {
    let (disk, _, _journal) = filled(2);
    let mut seen = 0;
    let error = recover(disk, CLUSTER, &mut |record| {
        seen = record.sequence;
        if record.sequence == 2 { Err("no such kind".into()) } else { Ok(()) }
    })
    .unwrap_err();
    assert_eq!(seen, 2);
    assert!(matches!(error, RecoverError::Corrupt { offset, .. } if offset == HEADER_BYTES as u64 + FRAME));
}

/// A payload that looks like a frame, and a frame of another segment, are not taken for one that follows damage.
#[test]
fn frames_within_payloads_and_of_other_files_do_not_count() {
    let (disk, mut model, mut journal) = filled(1);
    let first = disk.bytes(&file_name(1)).unwrap();
    let frame = &first[HEADER_BYTES..HEADER_BYTES + usize::try_from(FRAME).unwrap()];
    journal.append(2, frame).unwrap();
    journal.commit().unwrap();
    let at = HEADER_BYTES as u64 + FRAME;
    disk.flip(&file_name(1), at * 8);
    assert_eq!(model.recover(&disk).unwrap().summary().last_sequence, 1);
    let other =
        Header { kind: SegmentKind::First, cluster: CLUSTER, segment: 1, generation: 9, first_sequence: 1 };
    let mut bytes = other.encode().to_vec();
    bytes.extend(frame);
    disk.put(&file_name(1), &bytes);
    let recovery = model.recover(&disk).unwrap();
    assert_eq!((recovery.summary().last_sequence, recovery.summary().generation), (0, 9));
}
