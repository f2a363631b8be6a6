//! The documentation shows the table that the tests walk.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::PathBuf;

/// Set, it writes the page instead of comparing it.
const WRITE: &str = "MVM_WRITE_PAGES";

#[test]
fn the_page_of_verbs_and_states_is_the_table() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/verbs-and-states.md");
    let page = mvm_habits::page();
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let shown = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(shown == page, "{} is not the table: {WRITE}=1 writes it", file.display());
}

#[test]
fn eight_days_that_follow_each_other_see_every_combination() {
    for day in [0, 20_000] {
        let mut seen = 0;
        for combination in mvm_habits::Combination::all() {
            let days = (day..day + 8).filter(|&seed| combination.is_in_turn(seed)).count();
            assert!(days == 1 || days == 8, "{combination}: {days}");
            seen += 1;
        }
        assert!(seen > 10_000, "{seen}");
    }
}
