//! What was worked out for the latest calls: a bounded store in which a training step in its stride finds everything.

use std::{collections::HashMap, hash::Hash, sync::Arc};

const MOST: usize = 512; // more kinds of calls than the buckets of a large model make

/// Values by key. When there are too many, the one that was longest not asked for makes room.
pub(super) struct Recent<K, V> {
    values: HashMap<K, Entry<V>>,
    turn: u64,
}

struct Entry<V> {
    value: Arc<V>,
    asked: u64, // in which turn, last
}

impl<K: Clone + Eq + Hash, V> Recent<K, V> {
    pub(super) fn new() -> Self {
        Self {
            values: HashMap::new(),
            turn: 0,
        }
    }

    /// The value of `key`, made now if it is not here.
    pub(super) fn get(&mut self, key: K, make: impl FnOnce(&K) -> V) -> Arc<V> {
        self.turn += 1;
        if let Some(entry) = self.values.get_mut(&key) {
            entry.asked = self.turn;
            return entry.value.clone();
        }
        if self.values.len() == MOST {
            let oldest = self.values.iter().min_by_key(|(_, entry)| entry.asked);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.values.remove(&oldest);
            }
        }
        let value = Arc::new(make(&key));
        let entry = Entry {
            value: value.clone(),
            asked: self.turn,
        };
        self.values.insert(key, entry);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_longest_not_asked_for_makes_room() {
        let mut recent = Recent::new();
        for key in 0..MOST {
            recent.get(key, |key| *key);
        }
        recent.get(0, |_| unreachable!("it is here"));
        recent.get(MOST, |_| MOST);
        recent.get(0, |_| unreachable!("it was asked for lately"));
        let mut made = false;
        recent.get(1, |_| {
            made = true;
            1
        });
        assert!(made, "it was the oldest");
        assert_eq!(recent.values.len(), MOST);
    }
}
