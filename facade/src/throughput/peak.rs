//! What vendors promise: the operations a second that a device can do at most, by its name and the type of the numbers.
//!
//! All figures are dense, without the factor of two that structured sparsity promises on data sheets, and of tensor or matrix
//! units where the device has them for the type, with sums in 32 bits: consumer cards do those at half the rate that is
//! printed on their boxes.

use fabric_engine::kernels::Dtype;

use crate::rank_zero;

/// TFLOP/s, 0 where the device has no unit for the type, or none was published.
struct Row {
    /// Words of a driver's name, one after the other.
    names: &'static [&'static str],
    f64: f64,
    f32: f64,
    tf32: f64,
    bf16: f64,
    f16: f64,
    f8: f64,
    i8: f64,
}

/// A row: names; f64, f32, tf32, bf16, f16, f8, i8.
const fn row(names: &'static [&'static str], figures: [f64; 7]) -> Row {
    let [f64, f32, tf32, bf16, f16, f8, i8] = figures;
    Row {
        names,
        f64,
        f32,
        tf32,
        bf16,
        f16,
        f8,
        i8,
    }
}

#[rustfmt::skip] // a table
const TABLE: &[Row] = &[
    //                               f64    f32    tf32    bf16    f16     f8      i8
    // NVIDIA Blackwell data sheet (GB200 NVL72, HGX B200), "individual Blackwell GPU", half of the sparse figures.
    row(&["gb200"],                 [40.0,  80.0,  1250.0, 2500.0, 2500.0, 5000.0, 5000.0]),
    row(&["b200"],                  [37.0,  75.0,  1100.0, 2250.0, 2250.0, 4500.0, 4500.0]),
    // NVIDIA H200 data sheet, half of the sparse figures.
    row(&["h200"],                  [34.0,  67.0,  494.5,  989.5,  989.5,  1979.0, 1979.0]),
    row(&["h200 nvl"],              [30.0,  60.0,  417.5,  835.5,  835.5,  1670.5, 1670.5]),
    // NVIDIA GH200 Grace Hopper data sheet: its GPU is an H100's, whatever the memory.
    row(&["gh200"],                 [34.0,  67.0,  494.5,  989.5,  989.5,  1979.0, 1979.0]),
    // NVIDIA H100 data sheet (SXM, NVL), half of the sparse figures; its first edition for PCIe. "H100 80GB HBM3" is SXM.
    row(&["h100"],                  [34.0,  67.0,  494.5,  989.5,  989.5,  1979.0, 1979.0]),
    row(&["h100 nvl"],              [30.0,  60.0,  417.5,  835.5,  835.5,  1670.5, 1670.5]),
    row(&["h100 pcie"],             [25.6,  51.2,  378.0,  756.5,  756.5,  1513.0, 1513.0]),
    // NVIDIA A100 and A800 80 GB data sheets: the A800 differs in NVLink alone.
    row(&["a100", "a800"],          [9.7,   19.5,  156.0,  312.0,  312.0,  0.0,    624.0]),
    // NVIDIA A30 data sheet.
    row(&["a30"],                   [5.2,   10.3,  82.0,   165.0,  165.0,  0.0,    330.0]),
    // NVIDIA A40 data sheet.
    row(&["a40"],                   [0.0,   37.4,  74.8,   149.7,  149.7,  0.0,    299.3]),
    // NVIDIA A10 data sheet.
    row(&["a10"],                   [0.0,   31.2,  62.5,   125.0,  125.0,  0.0,    250.0]),
    // NVIDIA and AWS, A10G data sheet: another clock and slower tensor cores than the A10's.
    row(&["a10g"],                  [0.0,   35.0,  35.0,   70.0,   70.0,   0.0,    140.0]),
    // NVIDIA L4, L40 and L40S data sheets, half of the sparse figures.
    row(&["l4"],                    [0.0,   30.3,  60.0,   121.0,  121.0,  242.5,  242.5]),
    row(&["l40"],                   [0.0,   90.5,  90.5,   181.0,  181.0,  362.0,  362.0]),
    row(&["l40s"],                  [0.0,   91.6,  183.0,  362.0,  362.0,  733.0,  733.0]),
    // NVIDIA Ada GPU architecture 2.1, appendix, RTX 6000; data sheets of the RTX 5000, 4500 and 4000 Ada: "tensor
    // performance" there is sparse FP8, a quarter of it dense FP16.
    row(&["rtx 6000 ada"],          [0.0,   91.1,  182.1,  364.2,  364.2,  728.5,  728.5]),
    row(&["rtx 5000 ada"],          [0.0,   65.3,  130.6,  261.1,  261.1,  522.2,  522.2]),
    row(&["rtx 4500 ada"],          [0.0,   39.6,  79.3,   158.5,  158.5,  317.0,  317.0]),
    row(&["rtx 4000 ada"],          [0.0,   26.7,  53.5,   106.9,  106.9,  213.8,  213.8]),
    row(&["rtx 4000 sff ada"],      [0.0,   19.2,  38.4,   76.7,   76.7,   153.4,  153.4]),
    // NVIDIA RTX A6000, A5000, A4500, A4000 data sheets: "tensor performance" is sparse FP16, half of it dense.
    row(&["rtx a6000"],             [0.0,   38.7,  77.4,   154.8,  154.8,  0.0,    309.7]),
    row(&["rtx a5000"],             [0.0,   27.8,  55.6,   111.1,  111.1,  0.0,    222.2]),
    row(&["rtx a4500"],             [0.0,   23.7,  47.3,   94.6,   94.6,   0.0,    189.2]),
    row(&["rtx a4000"],             [0.0,   19.2,  38.3,   76.7,   76.7,   0.0,    153.4]),
    // NVIDIA RTX Blackwell GPU architecture (GeForce RTX 50), appendices, "with FP32 accumulate".
    row(&["rtx 5090"],              [0.0,   104.8, 104.8,  209.5,  209.5,  419.0,  838.0]),
    row(&["rtx 5080"],              [0.0,   56.3,  56.3,   112.6,  112.6,  225.1,  450.2]),
    row(&["rtx 5070 ti"],           [0.0,   43.9,  43.9,   87.9,   87.9,   175.8,  351.5]),
    row(&["rtx 5070"],              [0.0,   30.9,  30.9,   61.7,   61.7,   123.5,  246.9]),
    // NVIDIA Ada GPU architecture 2.1, appendices, "with FP32 accumulate"; the SUPER cards and the 4090 D by cores and clock.
    row(&["rtx 4090"],              [0.0,   82.6,  82.6,   165.2,  165.2,  330.3,  660.6]),
    row(&["rtx 4090 d"],            [0.0,   73.5,  73.5,   147.1,  147.1,  294.2,  588.4]),
    row(&["rtx 4080 super"],        [0.0,   52.2,  52.2,   104.4,  104.4,  208.8,  417.6]),
    row(&["rtx 4080"],              [0.0,   48.7,  48.7,   97.5,   97.5,   194.9,  389.9]),
    row(&["rtx 4070 ti super"],     [0.0,   44.1,  44.1,   88.2,   88.2,   176.4,  352.8]),
    row(&["rtx 4070 ti"],           [0.0,   40.1,  40.1,   80.2,   80.2,   160.4,  320.7]),
    row(&["rtx 4070 super"],        [0.0,   35.5,  35.5,   71.0,   71.0,   142.0,  284.0]),
    row(&["rtx 4070"],              [0.0,   29.1,  29.1,   58.3,   58.3,   116.6,  233.2]),
    row(&["rtx 4060 ti"],           [0.0,   22.1,  22.1,   44.1,   44.1,   88.2,   176.5]),
    row(&["rtx 4060"],              [0.0,   15.1,  15.1,   30.2,   30.2,   60.5,   121.0]),
    // NVIDIA Ampere GA102 GPU architecture 2.1, appendices, "with FP32 accumulate"; cards after it by cores and clock.
    row(&["rtx 3090 ti"],           [0.0,   40.0,  40.0,   80.0,   80.0,   0.0,    320.0]),
    row(&["rtx 3090"],              [0.0,   35.6,  35.6,   71.0,   71.0,   0.0,    284.0]),
    row(&["rtx 3080 ti"],           [0.0,   34.1,  34.1,   68.2,   68.2,   0.0,    272.8]),
    row(&["rtx 3080"],              [0.0,   29.8,  29.8,   59.5,   59.5,   0.0,    238.0]),
    row(&["rtx 3070 ti"],           [0.0,   21.7,  21.7,   43.5,   43.5,   0.0,    174.0]),
    row(&["rtx 3070"],              [0.0,   20.3,  20.3,   40.6,   40.6,   0.0,    162.6]),
    row(&["rtx 3060 ti"],           [0.0,   16.2,  16.2,   32.4,   32.4,   0.0,    129.6]),
    row(&["rtx 3060"],              [0.0,   12.7,  12.7,   25.5,   25.5,   0.0,    101.9]),
    // NVIDIA Turing GPU architecture, appendices, Founders Editions, "with FP32 accumulate"; Titan and Quadro sum in 32 bits
    // at the full rate. Turing has no BF16 and no TF32.
    row(&["rtx 2080 ti"],           [0.0,   14.2,  0.0,    0.0,    56.9,   0.0,    227.7]),
    row(&["rtx 2080 super"],        [0.0,   11.2,  0.0,    0.0,    44.6,   0.0,    178.4]),
    row(&["rtx 2080"],              [0.0,   10.6,  0.0,    0.0,    42.4,   0.0,    169.6]),
    row(&["rtx 2070 super"],        [0.0,   9.1,   0.0,    0.0,    36.3,   0.0,    145.0]),
    row(&["rtx 2070"],              [0.0,   7.9,   0.0,    0.0,    31.5,   0.0,    126.0]),
    row(&["rtx 2060 super"],        [0.0,   7.2,   0.0,    0.0,    28.7,   0.0,    114.8]),
    row(&["rtx 2060"],              [0.0,   6.5,   0.0,    0.0,    25.8,   0.0,    103.2]),
    row(&["titan rtx", "quadro rtx 6000", "quadro rtx 8000"],
                                    [0.0,   16.3,  0.0,    0.0,    130.5,  0.0,    261.0]),
    row(&["quadro rtx 5000"],       [0.0,   11.2,  0.0,    0.0,    89.2,   0.0,    178.4]),
    // NVIDIA T4 data sheet.
    row(&["t4"],                    [0.0,   8.1,   0.0,    0.0,    65.0,   0.0,    130.0]),
    // NVIDIA V100 and V100S data sheets.
    row(&["v100 sxm2", "v100 sxm3"],[7.8,   15.7,  0.0,    0.0,    125.0,  0.0,    0.0]),
    row(&["v100 pcie"],             [7.0,   14.0,  0.0,    0.0,    112.0,  0.0,    0.0]),
    row(&["v100s"],                 [8.2,   16.4,  0.0,    0.0,    130.0,  0.0,    0.0]),
    // NVIDIA P100 data sheet.
    row(&["p100 sxm2"],             [5.3,   10.6,  0.0,    0.0,    21.2,   0.0,    0.0]),
    row(&["p100 pcie"],             [4.7,   9.3,   0.0,    0.0,    18.7,   0.0,    0.0]),
    // AMD Instinct MI300X, MI325X, MI300A data sheets, matrix units.
    row(&["mi300x", "mi325x"],      [163.4, 163.4, 653.7,  1307.4, 1307.4, 2614.9, 2614.9]),
    row(&["mi300a"],                [122.6, 122.6, 490.3,  980.6,  980.6,  1961.2, 1961.2]),
    // AMD Instinct MI250X, MI250, MI210 data sheets, matrix units. A driver's device is one of the two dies of an MI250X or
    // MI250, and has half of the card's figure.
    row(&["mi250x"],                [47.9,  47.9,  0.0,    191.5,  191.5,  0.0,    191.5]),
    row(&["mi250", "mi210"],        [45.3,  45.3,  0.0,    181.0,  181.0,  0.0,    181.0]),
    // AMD Instinct MI100 data sheet.
    row(&["mi100"],                 [11.5,  46.1,  0.0,    92.3,   184.6,  0.0,    184.6]),
    // Google Cloud TPU documentation, "peak compute per chip".
    row(&["tpu v2"],                [0.0,   0.0,   0.0,    45.0,   0.0,    0.0,    0.0]),
    row(&["tpu v3"],                [0.0,   0.0,   0.0,    123.0,  0.0,    0.0,    0.0]),
    row(&["tpu v4"],                [0.0,   0.0,   0.0,    275.0,  0.0,    0.0,    275.0]),
    row(&["tpu v5e", "tpu v5 lite", "v5litepod"],
                                    [0.0,   0.0,   0.0,    197.0,  0.0,    0.0,    394.0]),
    row(&["tpu v5p", "tpu v5"],     [0.0,   0.0,   0.0,    459.0,  0.0,    0.0,    918.0]),
    row(&["tpu v6e", "tpu v6 lite"],[0.0,   0.0,   0.0,    918.0,  0.0,    0.0,    1836.0]),
    // Other chips with names that begin like those above, of which no dense figure is published.
    row(&["rtx 5090 d"],            [0.0; 7]),
];

/// Words that make another device of it: a slower chip of the same name, or a slice of one.
const APART: [&str; 4] = ["laptop", "mobile", "max q", "mig"];

/// Operations a second that the device called `name`, as its driver prints it, can do at most on numbers of this type; `None`,
/// and a warning that is said once, when it is not known. `F32` is arithmetic in whole 32 bits: for TF32 see [`tf32_flops`].
///
/// ```
/// use fabric::{engine::kernels::Dtype, throughput::available_flops};
///
/// assert_eq!(available_flops("NVIDIA H200", Dtype::BF16), Some(989.5e12));
/// assert_eq!(available_flops("NVIDIA L40S", Dtype::BF16), Some(362e12));
/// assert_eq!(available_flops("a chip of tomorrow", Dtype::BF16), None);
/// ```
pub fn available_flops(name: &str, dtype: Dtype) -> Option<f64> {
    let figure = |row: &Row| match dtype {
        Dtype::F64 => row.f64,
        Dtype::F32 => row.f32,
        Dtype::BF16 => row.bf16,
        Dtype::F16 => row.f16,
        Dtype::F8E4M3 | Dtype::F8E5M2 => row.f8,
        Dtype::I8 | Dtype::U8 => row.i8,
        _ => 0.0,
    };
    known(name, &dtype.to_string(), figure)
}

/// [`available_flops`] of `f32` products that are rounded to 10 fraction bits, where a library was allowed to.
pub fn tf32_flops(name: &str) -> Option<f64> {
    known(name, "tf32", |row| row.tf32)
}

fn known(name: &str, what: &str, figure: impl Fn(&Row) -> f64) -> Option<f64> {
    let found = find(name).map(figure).filter(|figure| *figure > 0.0);
    if found.is_none() {
        rank_zero::warn_once(format!(
            "no peak is known of '{name}' for {what}: give one to Throughput::available_flops for the model FLOPs \
             utilisation"
        ));
    }
    found.map(|tera| tera * 1e12)
}

/// The row with the longest name among the words of `name`.
fn find(name: &str) -> Option<&'static Row> {
    let words = words(name);
    let has = |key: &str| {
        let key: Vec<_> = key.split(' ').collect();
        words.windows(key.len()).any(|window| window == key)
    };
    if APART.into_iter().any(has) {
        return None;
    }
    let names = TABLE
        .iter()
        .flat_map(|row| row.names.iter().map(move |name| (*name, row)));
    let found = names.filter(|(name, _)| has(name));
    found.max_by_key(|(name, _)| name.len()).map(|(_, row)| row)
}

/// Letters and digits between anything else, in lower case.
fn words(name: &str) -> Vec<String> {
    let words = name.split(|letter: char| !letter.is_alphanumeric());
    let words = words.filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TFLOP/s in bf16, else in f16.
    fn half(name: &str) -> f64 {
        let row = find(name).unwrap_or_else(|| panic!("{name} is not known"));
        if row.bf16 > 0.0 { row.bf16 } else { row.f16 }
    }

    // UTIL-13, BUG-14, line 58
    #[test]
    fn names_are_found_as_drivers_print_them() {
        for (name, tera) in [
            ("NVIDIA GB200", 2500.0),
            ("NVIDIA B200", 2250.0),
            ("NVIDIA H200", 989.5),
            ("NVIDIA H200 NVL", 835.5),
            ("NVIDIA GH200 480GB", 989.5),
            ("NVIDIA GH200 144G HBM3e", 989.5),
            ("NVIDIA H100 80GB HBM3", 989.5),
            ("NVIDIA H100 PCIe", 756.5),
            ("NVIDIA H100 NVL", 835.5),
            ("NVIDIA A100-SXM4-80GB", 312.0),
            ("NVIDIA A100-PCIE-40GB", 312.0),
            ("NVIDIA A800-SXM4-80GB", 312.0),
            ("NVIDIA A30", 165.0),
            ("NVIDIA A40", 149.7),
            ("NVIDIA A10", 125.0),
            ("NVIDIA A10G", 70.0),
            ("NVIDIA L4", 121.0),
            ("NVIDIA L40", 181.0),
            ("NVIDIA L40S", 362.0),
            ("NVIDIA RTX A6000", 154.8),
            ("NVIDIA RTX A4000", 76.7),
            ("NVIDIA RTX 6000 Ada Generation", 364.2),
            ("NVIDIA RTX 4000 SFF Ada Generation", 76.7),
            ("NVIDIA GeForce RTX 5090", 209.5),
            ("NVIDIA GeForce RTX 5070 Ti", 87.9),
            ("NVIDIA GeForce RTX 4090", 165.2),
            ("NVIDIA GeForce RTX 4090 D", 147.1),
            ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
            ("NVIDIA GeForce RTX 4070", 58.3),
            ("NVIDIA GeForce RTX 3090 Ti", 80.0),
            ("NVIDIA GeForce RTX 2080 Ti", 56.9),
            ("NVIDIA TITAN RTX", 130.5),
            ("Quadro RTX 6000", 130.5),
            ("Tesla T4", 65.0),
            ("Tesla V100-SXM2-16GB", 125.0),
            ("Tesla V100-PCIE-32GB", 112.0),
            ("Tesla V100S-PCIE-32GB", 130.0),
            ("Tesla P100-PCIE-16GB", 18.7),
            ("AMD Instinct MI300X", 1307.4),
            ("AMD Instinct MI250X / MI250", 191.5),
            ("TPU v5 lite", 197.0),
            ("TPU v5p", 459.0),
            ("v5litepod-8", 197.0),
            ("TPU v6e", 918.0),
        ] {
            assert_eq!(half(name), tera, "{name}");
        }
    }

    // UTIL-13
    #[test]
    fn what_only_sounds_like_it_is_unknown_and_said_once() {
        for name in [
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 2080 with Max-Q Design",
            "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            "NVIDIA A1000",
            "NVIDIA L400",
            "NVIDIA GeForce GTX 1080 Ti",
            "",
        ] {
            assert!(find(name).is_none(), "{name}");
        }
        assert_eq!(
            available_flops("NVIDIA GeForce RTX 5090 D", Dtype::F16),
            None
        );
        assert_eq!(
            available_flops("Tesla T4", Dtype::BF16),
            None,
            "Turing has none"
        );
        assert_eq!(available_flops("NVIDIA H200", Dtype::I64), None);
        assert_eq!(tf32_flops("NVIDIA A100-SXM4-80GB"), Some(156e12));
        assert_eq!(
            available_flops("NVIDIA A100-SXM4-80GB", Dtype::F32),
            Some(19.5e12)
        );
    }

    #[test]
    fn no_name_stands_twice_and_rates_double_as_widths_halve() {
        let mut names: Vec<_> = TABLE.iter().flat_map(|row| row.names).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
        for row in TABLE
            .iter()
            .filter(|row| row.bf16 > 0.0 && row.f16 > 0.0 && row.f8 > 0.0)
        {
            let ratio = row.f8 / row.bf16;
            assert!((ratio - 2.0).abs() < 0.03, "{:?}: {ratio}", row.names);
        }
    }
}
