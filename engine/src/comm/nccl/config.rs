//! How a communicator is to be, and the C structure that says so to NCCL. That has grown over the versions: each library
//! is given the layout that it knows, and a newer one fills in what it has besides.

use std::{
    ffi::{CString, c_char, c_int},
    time::Duration,
};

use super::library::Version;
use crate::{
    clock::Clock,
    error::{Error, Result},
    signal::Signal,
};

const MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;

/// How a communicator is to be. What is `None` is NCCL's choice; what a library is too old to be told is left out.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The clock on which `deadline` is read.
    pub clock: Clock,
    /// How long a call may be in progress.
    pub deadline: Option<Duration>,
    /// Raised when the group has failed: ends every wait.
    pub signal: Signal,
    /// Blocks of a thread block cluster (2.17).
    pub cluster_blocks: Option<i32>,
    /// The fewest blocks that a kernel of NCCL's takes (2.17).
    pub min_blocks: Option<i32>,
    /// The most (2.17).
    pub max_blocks: Option<i32>,
    /// Which network plugin (2.17).
    pub net: Option<String>,
    /// Whether what is split from this communicator shares its resources (2.18).
    pub split_share: Option<bool>,
    /// The traffic class of its packets (2.25).
    pub traffic_class: Option<i32>,
    /// Its name in NCCL's logs and profiles (2.27).
    pub name: Option<String>,
}

/// NCCL's structure, with the fields up to 2.27. A library takes `size` bytes of it.
#[repr(C)]
#[derive(Debug)]
pub(super) struct RawConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,         // 2.14
    cga_cluster_size: c_int, // 2.17, and the next three
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,       // 2.18
    traffic_class: c_int,     // 2.25: where 2.18 had padding
    comm_name: *const c_char, // 2.27, and the rest
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
}

/// The layouts: the version that brought it, and its size in bytes.
const LAYOUTS: [(i32, usize); 5] = [
    (22_700, 72),
    (22_500, 48),
    (21_800, 48),
    (21_700, 40),
    (21_400, 24),
];

/// The structure, and the texts that it points to.
pub(super) struct Told {
    pub(super) raw: RawConfig,
    _texts: [Option<CString>; 2],
}

impl Config {
    /// How long a call may be in progress: ten minutes unless told otherwise, as on every communicator.
    pub(super) fn patience(&self) -> Duration {
        self.deadline.unwrap_or(Duration::from_secs(600))
    }

    /// For a library of this version.
    pub(super) fn tell(&self, version: Version) -> Result<Told> {
        let layout = LAYOUTS.iter().find(|(since, _)| *since <= version.code());
        let (since, size) = *layout.unwrap_or(&LAYOUTS[4]);
        let (net, name) = (text(self.net.as_deref())?, text(self.name.as_deref())?);
        let pointer =
            |text: &Option<CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
        let number = |value: Option<c_int>| value.unwrap_or(UNDEFINED);
        let raw = RawConfig {
            size,
            magic: MAGIC,
            version: since as u32,
            blocking: 0,
            cga_cluster_size: number(self.cluster_blocks),
            min_ctas: number(self.min_blocks),
            max_ctas: number(self.max_blocks),
            net_name: pointer(&net),
            split_share: number(self.split_share.map(c_int::from)),
            traffic_class: number(self.traffic_class),
            comm_name: pointer(&name),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
        };
        Ok(Told {
            raw,
            _texts: [net, name],
        })
    }
}

fn text(text: Option<&str>) -> Result<Option<CString>> {
    text.map(CString::new).transpose().map_err(|_| {
        let what = format!("NCCL cannot be told {text:?}, which holds a zero byte");
        Error::argument(what, "Leave it out")
    })
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Goal: the bytes are the header's. Method: offsets written down from the headers of 2.14, 2.17, 2.18, 2.25, 2.27.
    #[test]
    fn every_layout_is_a_prefix_of_the_last() {
        let offsets = [
            offset_of!(RawConfig, magic),
            offset_of!(RawConfig, version),
            offset_of!(RawConfig, blocking),
            offset_of!(RawConfig, cga_cluster_size),
            offset_of!(RawConfig, max_ctas),
            offset_of!(RawConfig, net_name),
            offset_of!(RawConfig, split_share),
            offset_of!(RawConfig, traffic_class),
            offset_of!(RawConfig, comm_name),
            offset_of!(RawConfig, collnet_enable),
            offset_of!(RawConfig, nvls_ctas),
        ];
        assert_eq!(offsets, [8, 12, 16, 20, 28, 32, 40, 44, 48, 56, 68]);
        assert_eq!(size_of::<RawConfig>(), 72);
    }

    #[test]
    fn each_library_gets_the_layout_that_it_knows() {
        let cases = [
            (21_405, 24, 21_400),
            (21_701, 40, 21_700),
            (21_805, 48, 21_800),
            (22_403, 48, 21_800),
            (22_501, 48, 22_500),
            (22_703, 72, 22_700),
            (23_203, 72, 22_700),
        ];
        for (version, size, since) in cases {
            let told = Config::default().tell(Version::from_code(version)).unwrap();
            assert_eq!(
                (told.raw.size, told.raw.version),
                (size, since),
                "{version}"
            );
            assert_eq!((told.raw.magic, told.raw.blocking), (0xcafe_beef, 0));
            assert_eq!(
                (told.raw.min_ctas, told.raw.nvls_ctas),
                (i32::MIN, i32::MIN)
            );
            assert!(told.raw.net_name.is_null() && told.raw.comm_name.is_null());
        }
    }

    #[test]
    fn what_is_asked_for_is_told_and_a_text_must_be_one() {
        let config = Config {
            max_blocks: Some(8),
            split_share: Some(true),
            name: Some("world".into()),
            ..Config::default()
        };
        let told = config.tell(Version::from_code(22_803)).unwrap();
        assert_eq!((told.raw.max_ctas, told.raw.split_share), (8, 1));
        // SAFETY: the structure keeps the text alive.
        let name = unsafe { std::ffi::CStr::from_ptr(told.raw.comm_name) };
        assert_eq!(name, c"world");
        let net = Some("a\0b".into());
        let config = Config {
            net,
            ..Config::default()
        };
        let said = config
            .tell(Version::from_code(22_803))
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains("zero byte"), "{said}");
    }
}
