//! The few messages of protocol buffers that an event file holds, written by hand: a crate and generated code would be
//! longer. A field is a key, number and kind in one varint, and a value.

/// A message being written.
#[derive(Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// int32, int64, bool or an enum; none of ours is negative.
    pub(super) fn integer(mut self, field: u32, value: u64) -> Self {
        self.key(field, 0);
        self.varint(value);
        self
    }

    pub(super) fn double(mut self, field: u32, value: f64) -> Self {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn float(mut self, field: u32, value: f32) -> Self {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    /// string or bytes.
    pub(super) fn bytes(mut self, field: u32, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    pub(super) fn message(self, field: u32, value: Message) -> Self {
        self.bytes(field, value.0)
    }

    fn key(&mut self, field: u32, kind: u8) {
        self.varint(u64::from(field) << 3 | u64::from(kind));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
pub(super) mod read {
    //! The other direction, for tests: a message as its fields.

    /// A field's value.
    #[derive(Clone, Debug, PartialEq)]
    pub(in crate::logger) enum Field {
        Integer(u64),
        Eight([u8; 8]),
        Bytes(Vec<u8>),
        Four([u8; 4]),
    }

    impl Field {
        pub(in crate::logger) fn bytes(&self) -> &[u8] {
            match self {
                Self::Bytes(bytes) => bytes,
                _ => panic!("{self:?} is no text"),
            }
        }
        pub(in crate::logger) fn text(&self) -> &str {
            std::str::from_utf8(self.bytes()).unwrap()
        }
        pub(in crate::logger) fn fields(&self) -> Fields {
            fields(self.bytes())
        }
        pub(in crate::logger) fn double(&self) -> f64 {
            match self {
                Self::Eight(bytes) => f64::from_le_bytes(*bytes),
                _ => panic!("{self:?} is no double"),
            }
        }
    }

    pub(in crate::logger) struct Fields(Vec<(u64, Field)>);

    impl Fields {
        pub(in crate::logger) fn all(&self, number: u64) -> impl Iterator<Item = &Field> {
            self.0
                .iter()
                .filter(move |(known, _)| *known == number)
                .map(|(_, field)| field)
        }
        pub(in crate::logger) fn get(&self, number: u64) -> Option<&Field> {
            self.all(number).last()
        }
    }

    pub(in crate::logger) fn fields(mut bytes: &[u8]) -> Fields {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let field = match key & 7 {
                0 => Field::Integer(varint(&mut bytes)),
                1 => Field::Eight(take(&mut bytes, 8).try_into().unwrap()),
                2 => {
                    let len = varint(&mut bytes) as usize;
                    Field::Bytes(take(&mut bytes, len).to_vec())
                }
                5 => Field::Four(take(&mut bytes, 4).try_into().unwrap()),
                kind => panic!("no kind {kind}"),
            };
            found.push((key >> 3, field));
        }
        Fields(found)
    }

    fn take<'a>(bytes: &mut &'a [u8], len: usize) -> &'a [u8] {
        let (head, rest) = bytes.split_at(len);
        *bytes = rest;
        head
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = take(bytes, 1)[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_those_of_the_published_examples() {
        // protobuf.dev/programming-guides/encoding: {a: 150} and {b: "testing"} and {c: {a: 150}}
        let message = || Message::new().integer(1, 150);
        assert_eq!(message().into_bytes(), [0x08, 0x96, 0x01]);
        let text = Message::new().bytes(2, "testing").into_bytes();
        assert_eq!(text, [&[0x12, 0x07][..], b"testing"].concat());
        let nested = Message::new().message(3, message()).into_bytes();
        assert_eq!(nested, [0x1a, 0x03, 0x08, 0x96, 0x01]);
    }

    #[test]
    fn what_is_written_is_read() {
        let values = [0, 1, 127, 128, 300, u64::MAX];
        for value in values {
            let message = Message::new()
                .integer(17, value)
                .double(2, -0.5)
                .float(3, 1.5);
            let fields = read::fields(&message.into_bytes());
            assert_eq!(fields.get(17), Some(&read::Field::Integer(value)));
            assert_eq!(fields.get(2).unwrap().double(), -0.5);
            assert_eq!(
                fields.get(3),
                Some(&read::Field::Four(1.5f32.to_le_bytes()))
            );
        }
    }
}
