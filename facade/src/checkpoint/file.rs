//! One safetensors file, written from front to back while its tensors are read elsewhere, and looked into without reading
//! them. The library would write a file only from tensors that cannot fail to be read, and read one only whole.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt,
};

use fabric_engine::kernels::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::dtype::tensor_dtype;

const MOST_HEADER_BYTES: u64 = 100_000_000; // what every reader takes
const LENGTH_BYTES: u64 = 8; // the header's length stands in front of it
const BUFFER_BYTES: usize = 1 << 20;

/// A tensor that a file is to hold.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) key: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Item {
    /// Its place among others, which is safetensors' own order: the types with the strictest alignment first.
    pub(super) fn order(&self, other: &Self) -> std::cmp::Ordering {
        let by_dtype = tensor_dtype(other.dtype).cmp(&tensor_dtype(self.dtype));
        by_dtype.then_with(|| self.key.cmp(&other.key))
    }
}

/// A file that is being written.
pub(super) struct Writer {
    out: BufWriter<fs::File>,
    due: u64, // bytes that the header promises and that have not come
}

impl Writer {
    /// Begin with the header. The bytes of `items` follow, in this order.
    pub(super) fn new<'a>(
        file: fs::File,
        items: impl Iterator<Item = &'a Item>,
        metadata: Option<HashMap<String, String>>,
    ) -> io::Result<Self> {
        let (mut offset, mut seen, mut infos) = (0, HashSet::new(), Vec::new());
        for item in items {
            if !seen.insert(&item.key) {
                let what = format!("two tensors would be called '{}'", item.key);
                return Err(io::Error::other(what));
            }
            let bytes = item.shape.iter().product::<usize>() * item.dtype.size();
            let info = TensorInfo {
                dtype: tensor_dtype(item.dtype),
                shape: item.shape.clone(),
                data_offsets: (offset, offset + bytes),
            };
            offset += bytes;
            infos.push((item.key.clone(), info));
        }
        let metadata = Metadata::new(metadata, infos).map_err(io::Error::other)?;
        let mut header = serde_json::to_vec(&metadata)?;
        header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
        let length = header.len() as u64;
        if length > MOST_HEADER_BYTES {
            return Err(io::Error::other(format!(
                "names, values and shapes take {length} bytes, and readers of safetensors take {MOST_HEADER_BYTES}"
            )));
        }
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        out.write_all(&length.to_le_bytes())?;
        out.write_all(&header)?;
        let due = offset as u64;
        Ok(Self { out, due })
    }

    /// The next bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.due = self
            .due
            .checked_sub(bytes.len() as u64)
            .expect("no more bytes than the header promised");
        self.out.write_all(bytes)
    }

    /// Return when everything is on the disk.
    pub(super) fn finish(self) -> io::Result<()> {
        assert_eq!(self.due, 0, "bytes that the header promised did not come");
        let file = self
            .out
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.sync_all()
    }
}

/// What a file says of itself.
pub(super) struct Header {
    metadata: Metadata,
    data: u64, // where the tensors begin
}

impl Header {
    /// Read it, and compare it with the file's length. Otherwise, in words, what is wrong with the file.
    pub(super) fn read(file: &fs::File) -> Result<Self, String> {
        let failed = |error: io::Error| error.to_string();
        let bytes = file.metadata().map_err(failed)?.len();
        let mut length = [0; LENGTH_BYTES as usize];
        if bytes < LENGTH_BYTES {
            return Err(format!("it has {bytes} bytes, too few for any header"));
        }
        file.read_exact_at(&mut length, 0).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > MOST_HEADER_BYTES || length > bytes - LENGTH_BYTES {
            return Err(format!(
                "its header would have {length} bytes, and the file has {bytes}: it is cut off, or no safetensors file"
            ));
        }
        let mut text = vec![0; length as usize]; // at most MOST_HEADER_BYTES
        file.read_exact_at(&mut text, LENGTH_BYTES)
            .map_err(failed)?;
        let metadata: Metadata =
            serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let data = LENGTH_BYTES + length;
        let header = Self { metadata, data };
        header.compare(bytes).map(|()| header)
    }

    fn compare(&self, bytes: u64) -> Result<(), String> {
        let there = bytes - self.data;
        let due = self.metadata.data_len() as u64;
        if due < there {
            return Err(format!(
                "it has {} bytes that its header does not know",
                there - due
            ));
        }
        let keys = self.metadata.offset_keys().into_iter();
        let end = |key: &String| {
            self.metadata
                .info(key)
                .map_or(0, |info| info.data_offsets.1)
        };
        let mut ends = keys.map(|key| (self.data + end(&key) as u64, key));
        match ends.find(|(end, _)| *end > bytes) {
            None => Ok(()),
            Some((end, key)) => Err(format!(
                "it is cut off: '{key}' ends at byte {end}, the file at byte {bytes}"
            )),
        }
    }

    /// A tensor's type and shape, and where in the file it begins.
    pub(super) fn find(&self, key: &str) -> Option<(&TensorInfo, u64)> {
        let info = self.metadata.info(key)?;
        Some((info, self.data + info.data_offsets.0 as u64))
    }

    /// All tensors, in the file's order.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, &TensorInfo)> {
        let keys = self.metadata.offset_keys().into_iter();
        keys.filter_map(|key| Some((key.clone(), self.metadata.info(&key)?)))
    }

    /// What stands beside the tensors, under `name`.
    pub(super) fn note(&self, name: &str) -> Option<&str> {
        Some(self.metadata.metadata().as_ref()?.get(name)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: &str, dtype: Dtype, numel: usize) -> Item {
        let (key, shape) = (key.into(), vec![numel]);
        Item { key, dtype, shape }
    }

    #[test]
    fn what_streams_into_a_file_is_what_the_library_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut items = [item("b", Dtype::U8, 3), item("a", Dtype::F32, 2)];
        items.sort_by(Item::order);
        let note = HashMap::from([("fabric".to_string(), "{}".to_string())]);
        let mut writer = Writer::new(file.reopen().unwrap(), items.iter(), Some(note)).unwrap();
        writer.put(&1f32.to_le_bytes()).unwrap();
        writer.put(&2f32.to_le_bytes()).unwrap();
        writer.put(&[7, 8, 9]).unwrap();
        writer.finish().unwrap();
        let bytes = fs::read(file.path()).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("b").unwrap().data(), [7, 8, 9]);
        let header = Header::read(file.as_file()).unwrap();
        let (info, start) = header.find("a").unwrap();
        assert_eq!(info.shape, [2]);
        assert_eq!(bytes[start as usize + 4..][..4], 2f32.to_le_bytes());
        assert_eq!(header.note("fabric"), Some("{}"));
    }

    #[test]
    fn line_50_a_file_that_is_cut_off_names_the_first_tensor_that_is_not_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let items = [item("a", Dtype::U8, 3), item("b", Dtype::U8, 3)];
        let mut writer = Writer::new(file.reopen().unwrap(), items.iter(), None).unwrap();
        writer.put(&[0; 6]).unwrap();
        writer.finish().unwrap();
        let bytes = file.as_file().metadata().unwrap().len();
        let said = |length: u64| {
            file.as_file().set_len(length).unwrap();
            Header::read(file.as_file()).err().unwrap()
        };
        assert!(said(bytes + 1).contains("1 bytes that its header does not know"));
        assert!(said(bytes - 1).contains("'b' ends at"));
        assert!(said(bytes - 4).contains("'a' ends at"));
        assert!(said(20).contains("its header would have"));
        assert!(said(3).contains("too few"));
    }

    #[test]
    fn two_tensors_of_one_name_are_refused() {
        let items = [item("a", Dtype::U8, 0), item("a", Dtype::U8, 0)];
        let file = tempfile::tempfile().unwrap();
        assert!(Writer::new(file, items.iter(), None).is_err());
    }
}
