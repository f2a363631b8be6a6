//! Records, and values that are none.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_store::{Store, StoreError, Transaction, TypedStore, Version, encode};
use serde::{Deserialize, Serialize};

crate::on_every_backend!(
    a_record_round_trips,
    one_bad_record_neither_hides_the_others_nor_is_skipped,
    a_record_without_a_json_form_is_refused,
);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Pool {
    desired: u32,
}

async fn a_record_round_trips(store: Arc<dyn Store>) {
    assert_eq!(store.get_typed::<Pool>("pools/a").await.unwrap(), None);
    let pool = Pool { desired: 3 };
    store.commit(Transaction::new().with(encode("pools/a", &pool).unwrap())).await.unwrap();
    let read = store.get_typed::<Pool>("pools/a").await.unwrap().unwrap();
    assert_eq!(read.record, pool);
    assert_eq!(read.key, "pools/a");
    assert_eq!((read.create_version, read.mod_version), (Version::new(1), Version::new(1)));
}

async fn one_bad_record_neither_hides_the_others_nor_is_skipped(store: Arc<dyn Store>) {
    let put = |key, bytes: &[u8]| store.commit(Transaction::new().put(key, bytes));
    put("pools/a", br#"{"desired": 1}"#).await.unwrap();
    put("pools/b", br#"{"desired": "many"}"#).await.unwrap();
    put("pools/c", &[0xff, 0]).await.unwrap();
    put("pools/d", br#"{"desired": 4, "from_the_future": true}"#).await.unwrap();

    let listing = store.list_typed::<Pool>("pools/").await.unwrap();

    assert_eq!(listing.version, Version::new(4));
    let good: Vec<_> = listing.records.iter().map(|r| (r.key.as_str(), r.record.desired)).collect();
    assert_eq!(good, [("pools/a", 1), ("pools/d", 4)]);
    let bad: Vec<_> = listing.bad.iter().map(|r| (r.key.as_str(), r.mod_version.get())).collect();
    assert_eq!(bad, [("pools/b", 2), ("pools/c", 3)]);
    assert!(listing.bad[0].to_string().contains("`pools/b`"), "{}", listing.bad[0]);
    assert!(listing.bad[0].reason.contains("expected u32"), "{}", listing.bad[0].reason);

    match store.get_typed::<Pool>("pools/b").await {
        Err(StoreError::BadRecord(bad)) => assert_eq!(bad, listing.bad[0]),
        other => panic!("expected a bad record, got {other:?}"),
    }
}

async fn a_record_without_a_json_form_is_refused(_: Arc<dyn Store>) {
    let record = BTreeMap::from([((1, 2), 3)]);
    let error = encode("pools/a", &record).unwrap_err();
    assert!(matches!(&error, StoreError::Encode { key, .. } if key == "pools/a"), "{error:?}");
}
