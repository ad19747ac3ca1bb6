//! How far a message is: one that leaves, read from its pieces of memory, and one that comes, written to them. Neither
//! knows how its bytes travel.

use super::super::{
    Parcel,
    frame::{HEADER_BYTES, Header},
};
use crate::buffer::Slab;

/// A message on its way out.
pub(super) struct Sending {
    /// Its index in the round.
    pub(super) parcel: usize,
    header: [u8; HEADER_BYTES],
    done: usize,  // bytes that have left, header included
    total: usize, // bytes to leave, header included
}

impl Sending {
    pub(super) fn new(parcel: usize, header: Header) -> Self {
        Self {
            parcel,
            header: header.encode(),
            done: 0,
            total: HEADER_BYTES + header.bytes as usize,
        }
    }

    /// Bytes that have not left.
    pub(super) fn left(&self) -> usize {
        self.total - self.done
    }

    /// Whether nothing has left yet.
    pub(super) fn is_new(&self) -> bool {
        self.done == 0
    }

    /// The next `most` bytes, where they lie.
    pub(super) fn parts<'a>(
        &'a self,
        parcel: &'a Parcel,
        memory: &'a [Slab],
        most: usize,
    ) -> impl Iterator<Item = &'a [u8]> {
        let pieces = parcel.pieces.iter();
        let parts = pieces.map(|piece| memory[piece.slab].bytes_of(&piece.range));
        let (mut skip, mut most) = (self.done, most);
        std::iter::once(&self.header[..])
            .chain(parts)
            .filter_map(move |part| {
                let start = skip.min(part.len());
                skip -= start;
                let end = (start + most).min(part.len());
                most -= end - start;
                (end > start).then(|| &part[start..end])
            })
    }

    /// So many bytes have left.
    pub(super) fn pass(&mut self, bytes: usize) {
        self.done += bytes;
    }
}

/// A message on its way in.
pub(super) struct Receiving {
    /// Its index in the round.
    pub(super) parcel: usize,
    header: [u8; HEADER_BYTES],
    expected: usize, // bytes of payload
    done: usize,     // bytes that have come, header included
    piece: usize,    // the piece being filled
    filled: usize,   // bytes of it
    is_accepted: bool,
}

impl Receiving {
    pub(super) fn new(parcel: usize, expected: usize) -> Self {
        Self {
            parcel,
            header: [0; HEADER_BYTES],
            expected,
            done: 0,
            piece: 0,
            filled: 0,
            is_accepted: false,
        }
    }

    /// Bytes of payload that are expected.
    pub(super) fn expected(&self) -> usize {
        self.expected
    }

    /// Bytes that have not come.
    pub(super) fn left(&self) -> usize {
        HEADER_BYTES + self.expected - self.done
    }

    /// Whether the header is whole, and was not taken.
    pub(super) fn has_new_header(&self) -> bool {
        self.done >= HEADER_BYTES && !self.is_accepted
    }

    /// The header, once it is whole, once.
    pub(super) fn take_header(&mut self) -> Option<&[u8; HEADER_BYTES]> {
        let is_new = self.has_new_header();
        self.is_accepted |= is_new;
        is_new.then_some(&self.header)
    }

    /// Where the next bytes go: what is missing of the header, and after it what is missing of one piece.
    pub(super) fn places<'a>(
        &'a mut self,
        parcel: &Parcel,
        memory: &'a mut [Slab],
    ) -> (&'a mut [u8], &'a mut [u8]) {
        let bytes =
            |piece: &crate::buffer::Piece| piece.range.len() * memory[piece.slab].dtype().size();
        while parcel
            .pieces
            .get(self.piece)
            .is_some_and(|piece| bytes(piece) == self.filled)
        {
            self.piece += 1;
            self.filled = 0;
        }
        let header = &mut self.header[self.done.min(HEADER_BYTES)..];
        match parcel.pieces.get(self.piece) {
            Some(piece) => {
                let whole = memory[piece.slab].bytes_of_mut(&piece.range);
                (header, &mut whole[self.filled..])
            }
            None => (header, &mut []),
        }
    }

    /// So many bytes have come to the [`places`](Receiving::places).
    pub(super) fn pass(&mut self, bytes: usize) {
        let of_header = bytes.min(HEADER_BYTES - self.done.min(HEADER_BYTES));
        self.filled += bytes - of_header;
        self.done += bytes;
    }

    /// Take in `bytes`, which are no more than are [`left`](Receiving::left).
    pub(super) fn put(&mut self, parcel: &Parcel, memory: &mut [Slab], mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (header, piece) = self.places(parcel, memory);
            let place = if header.is_empty() { piece } else { header };
            let (now, later) = bytes.split_at(place.len().min(bytes.len()));
            place[..now.len()].copy_from_slice(now);
            self.pass(now.len());
            bytes = later;
        }
    }
}
