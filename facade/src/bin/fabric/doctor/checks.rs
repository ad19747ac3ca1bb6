//! What ranks compute together, beside what must come out. Elements are small whole numbers, which every type and every sum
//! of them holds exactly.

use std::collections::BTreeMap;

use fabric::{
    Fabric, ReduceOp, Result,
    engine::{
        buffer::{Buffer, Slab},
        kernels::Element,
    },
};
use half::bf16;

/// What was tried, and what was wrong on this rank.
type Verdict = (String, Option<String>);

/// A check, which all ranks run together on vectors of these lengths.
pub(super) type Check = fn(&Fabric, &[usize]) -> Result<Verdict>;

/// A check that is the same for elements of every type.
macro_rules! typed {
    ($check:ident) => {
        |fabric, lengths| {
            let all = [
                ("f32", $check::<f32> as One),
                ("bf16", $check::<bf16>),
                ("i64", $check::<i64>),
            ];
            each(fabric, lengths, all)
        }
    };
}

pub(super) const ALL: [(&str, Check); 13] = [
    ("barrier", barrier),
    ("all_reduce", typed!(all_reduce)),
    ("reduce", typed!(reduce)),
    ("broadcast", typed!(broadcast)),
    ("all_gather", typed!(all_gather)),
    ("gather", typed!(gather)),
    ("scatter", typed!(scatter)),
    ("reduce_scatter", typed!(reduce_scatter)),
    ("all_to_all", typed!(all_to_all)),
    ("uneven lengths", typed!(uneven)),
    ("send, recv", typed!(pass_on)),
    ("objects", objects),
    ("split groups", split),
];

/// Whether ranks got what they should, on vectors of so many elements.
type One = fn(&Fabric, usize) -> Result<bool>;

fn each(fabric: &Fabric, lengths: &[usize], all: [(&str, One); 3]) -> Result<Verdict> {
    let mut wrong = None;
    for (dtype, check) in all {
        for length in lengths {
            if !check(fabric, *length)? && wrong.is_none() {
                wrong = Some(format!("{dtype} of {length} elements comes out wrong"));
            }
        }
    }
    let lengths: Vec<_> = lengths.iter().map(ToString::to_string).collect();
    let lengths = lengths.join(", ");
    Ok((format!("f32, bf16, i64 of {lengths} elements"), wrong))
}

/// A type that holds the whole numbers up to 256.
trait Number: Element + PartialEq {
    fn of(number: usize) -> Self;
}

impl Number for f32 {
    fn of(number: usize) -> Self {
        number as f32
    }
}

impl Number for bf16 {
    fn of(number: usize) -> Self {
        bf16::from_f32(number as f32)
    }
}

impl Number for i64 {
    fn of(number: usize) -> Self {
        number as i64
    }
}

/// Element `index` of `rank`'s vector.
fn number(rank: usize, index: usize) -> usize {
    index % 3 + rank % 2
}

/// `rank`'s vector.
fn vector<T: Number>(rank: usize, length: usize) -> Vec<T> {
    (0..length)
        .map(|index| T::of(number(rank, index)))
        .collect()
}

/// The sum of all ranks' vectors: at most 3 x 64 ranks.
fn sum<T: Number>(world: usize, length: usize) -> Vec<T> {
    let odd = world / 2;
    let of = |index: usize| T::of(world * (index % 3) + odd);
    (0..length).map(of).collect()
}

/// All ranks' vectors, one behind the other.
fn joined<T: Number>(world: usize, length: usize) -> Vec<T> {
    (0..world)
        .flat_map(|rank| vector::<T>(rank, length))
        .collect()
}

fn is<T: Number>(slab: &Slab, expected: &[T]) -> bool {
    slab.as_slice::<T>() == expected
}

fn barrier(fabric: &Fabric, _: &[usize]) -> Result<Verdict> {
    const TIMES: usize = 100;
    (0..TIMES).try_for_each(|_| fabric.barrier())?;
    Ok((format!("{TIMES} of them"), None))
}

fn all_reduce<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mut mine = vector::<T>(rank, length);
    fabric.all_reduce(&mut mine, ReduceOp::Sum)?;
    Ok(mine == sum(world, length))
}

fn reduce<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mut mine = vector::<T>(rank, length);
    fabric.reduce(&mut mine, ReduceOp::Sum, world - 1)?;
    Ok(rank != world - 1 || mine == sum(world, length))
}

fn broadcast<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, src) = (fabric.global_rank(), fabric.world_size() - 1);
    let mut mine = vector::<T>(rank, length);
    fabric.broadcast_buffer(&mut mine, src)?;
    Ok(mine == vector(src, length))
}

fn all_gather<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let all = fabric.all_gather(&vector::<T>(rank, length))?;
    Ok(is::<T>(&all, &joined(world, length)))
}

fn gather<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let all = fabric.gather(&vector::<T>(rank, length), 0)?;
    Ok(match all {
        Some(all) => rank == 0 && is::<T>(&all, &joined(world, length)),
        None => rank != 0,
    })
}

fn scatter<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let whole = joined::<T>(world, length);
    let mut mine = vec![T::of(9); length];
    let from = (rank == 0).then_some(&whole as &dyn Buffer);
    fabric.scatter(from, &mut mine, 0)?;
    Ok(mine == vector(rank, length))
}

fn reduce_scatter<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mine = fabric.reduce_scatter(&vector::<T>(rank, length * world), ReduceOp::Sum)?;
    let whole = sum(world, length * world);
    Ok(is::<T>(&mine, &whole[rank * length..][..length]))
}

fn all_to_all<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let mine = vector::<T>(rank, length * world);
    let came = fabric.all_to_all(&mine)?;
    // This rank's block of everybody's vector.
    let block = |from: usize| vector::<T>(from, length * world).split_off(rank * length);
    let due = (0..world).flat_map(|from| block(from).into_iter().take(length));
    Ok(is::<T>(&came, &due.collect::<Vec<_>>()))
}

/// An uneven gather, and an uneven exchange: rank r brings, and gets, r elements more than rank 0.
fn uneven<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let counts: Vec<_> = (0..world).map(|rank| length + rank).collect();
    let (all, told) = fabric.all_gather_uneven(&vector::<T>(rank, counts[rank]))?;
    let due = counts.iter().enumerate();
    let due: Vec<T> = due.flat_map(|(rank, count)| vector(rank, *count)).collect();
    let gathered = is(&all, &due) && told == counts;
    let mine = vector::<T>(rank, counts.iter().sum());
    let (came, told) = fabric.all_to_all_uneven(&mine, &counts)?;
    let before: usize = counts[..rank].iter().sum();
    let block =
        |from: usize| (before..before + counts[rank]).map(move |at| T::of(number(from, at)));
    let due: Vec<T> = (0..world).flat_map(block).collect();
    Ok(gathered && is(&came, &due) && told == vec![counts[rank]; world])
}

/// Rank 0's vector goes round: each gives it to the next, and the last back to rank 0.
fn pass_on<T: Number>(fabric: &Fabric, length: usize) -> Result<bool> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let (before, next) = ((rank + world - 1) % world, (rank + 1) % world);
    let due = vector::<T>(0, length);
    let mut came = vec![T::of(9); length];
    if rank == 0 {
        fabric.send(&due, next)?;
    }
    fabric.recv(&mut came, before)?;
    if rank != 0 {
        fabric.send(&came, next)?;
    }
    Ok(came == due)
}

fn objects(fabric: &Fabric, _: &[usize]) -> Result<Verdict> {
    type Object = BTreeMap<String, Vec<f64>>;
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let object =
        |rank: usize| Object::from([(format!("rank {rank}"), vec![rank as f64; rank * 1000])]);
    let all = fabric.all_gather_object(&object(rank))?;
    let gathered = all == (0..world).map(object).collect::<Vec<_>>();
    let told = fabric.broadcast(object(rank), world - 1)? == object(world - 1);
    let sum = fabric.all_reduce_value((rank as f64, rank), ReduceOp::Sum)?;
    let total = world * (world - 1) / 2;
    let right = gathered && told && sum == (total as f64, total);
    let wrong = (!right).then(|| "a value comes out wrong".to_string());
    Ok(("gathered, broadcast, added".into(), wrong))
}

/// Even ranks and odd ones, in the opposite order.
fn split(fabric: &Fabric, lengths: &[usize]) -> Result<Verdict> {
    let (rank, world) = (fabric.global_rank(), fabric.world_size());
    let color = rank % 2;
    let group = fabric.split(u32::try_from(color)?, u32::try_from(world - rank)?)?;
    let members: Vec<_> = (0..world).rev().filter(|rank| rank % 2 == color).collect();
    let mut wrong = None;
    for length in lengths {
        let mut mine = vector::<i64>(rank, *length);
        group.all_reduce(&mut mine, ReduceOp::Sum)?;
        let sum = |index| {
            members
                .iter()
                .map(|rank| number(*rank, index) as i64)
                .sum::<i64>()
        };
        if mine != (0..*length).map(sum).collect::<Vec<_>>() {
            wrong = Some(format!("the sum of {length} elements is not the group's"));
        }
    }
    let order = group.all_gather_object(&rank)?;
    if order != members {
        wrong = Some(format!(
            "ranks {order:?} and not {members:?} are in the group"
        ));
    }
    Ok((
        "even ranks and odd ones, in the opposite order".into(),
        wrong,
    ))
}
