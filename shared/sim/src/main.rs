//! Runs many seeds, or shows one. See `ci/sim`.

use std::process::ExitCode;

const USAGE: &str = "usage: holdfast-sim [--seeds N] [--from S] [--steps K] | --seed S [--steps K] [--trace]";

struct Args {
    seeds: u64,
    from: u64,
    steps: u64,
    one: Option<u64>,
    trace: bool,
}

fn args() -> Result<Args, String> {
    let mut args = Args { seeds: 1000, from: 0, steps: 1500, one: None, trace: false };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut number = || {
            let value = given.next().ok_or_else(|| format!("{name} needs a number"))?;
            value.parse().map_err(|_| format!("{name} needs a number, not {value}"))
        };
        match name.as_str() {
            "--seeds" => args.seeds = number()?,
            "--from" => args.from = number()?,
            "--steps" => args.steps = number()?,
            "--seed" => args.one = Some(number()?),
            "--trace" => args.trace = true,
            other => return Err(format!("what is {other}?")),
        }
    }
    Ok(args)
}

fn main() -> ExitCode {
    let args = match args() {
        Ok(args) => args,
        Err(words) => {
            eprintln!("{words}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A broken invariant is told with its seed; the words of the panic itself come with it.
    std::panic::set_hook(Box::new(|_| {}));
    if let Some(seed) = args.one {
        return match holdfast_sim::run(seed, args.steps) {
            Ok(done) => {
                if args.trace {
                    if let Ok(text) = holdfast_sim::trace(seed, args.steps) {
                        println!("{text}");
                    }
                }
                println!("seed {seed} is well: {done:?}");
                ExitCode::SUCCESS
            }
            Err(failure) => {
                println!("{failure}");
                ExitCode::FAILURE
            }
        };
    }
    let (mut steps, mut resumed, mut verdicts, mut failed) = (0, 0, [0; 4], Vec::new());
    for seed in args.from..args.from.saturating_add(args.seeds) {
        match holdfast_sim::run(seed, args.steps) {
            Ok(done) => {
                steps += done.steps;
                resumed += done.resumed;
                for (sum, more) in verdicts.iter_mut().zip(done.verdicts) {
                    *sum += more;
                }
            }
            Err(failure) => {
                println!("seed {seed} step {}: {}", failure.step, failure.words);
                println!("repeat it with: {}", failure.again());
                failed.push(seed);
                if failed.len() >= 20 {
                    break;
                }
            }
        }
    }
    let [unchanged, expired, changed, gone] = verdicts;
    println!(
        "{} seeds, {steps} events, {resumed} resumes: {unchanged} unchanged, {expired} expired unchanged, {changed} changed, \
         {gone} gone; {} failed",
        args.seeds,
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
